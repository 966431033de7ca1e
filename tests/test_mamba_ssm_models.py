"""Modules of mamba_ssm by their published names: transformers' with equal weights, caches, generation, files, install()."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
from interpreter import python

torch = pytest.importorskip("torch")

from subquad_torch.mamba_ssm import Mamba, Mamba2, Mamba3, MambaLMHeadModel  # noqa: E402
from subquad_torch.mamba_ssm.models.config_mamba import MambaConfig  # noqa: E402
from subquad_torch.mamba_ssm.modules.mamba2_simple import Mamba2Simple  # noqa: E402
from subquad_torch.mamba_ssm.modules.mamba_simple import Block  # noqa: E402
from subquad_torch.mamba_ssm.ops.triton.layernorm import RMSNorm  # noqa: E402
from subquad_torch.mamba_ssm.utils.generation import InferenceParams, decode, sample  # noqa: E402

MIXERS = {
    "Mamba": (Mamba, {"d_state": 4, "d_conv": 3, "bias": True}),
    "Mamba2": (
        Mamba2,
        {"d_state": 4, "headdim": 8, "ngroups": 2, "D_has_hdim": True, "dt_limit": (0.01, 0.05), "bias": True},
    ),
    "Mamba2 with a perceptron": (Mamba2, {"d_state": 4, "headdim": 8, "d_ssm": 16, "norm_before_gate": True}),
    "Mamba2 without a norm": (Mamba2, {"d_state": 4, "headdim": 8, "rmsnorm": False, "conv_bias": False}),
}


def mixer(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    kind, sizes = MIXERS[name]
    made = kind(16, **sizes, **options).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return made


def lm(layer: str = "Mamba1", **options: Any) -> MambaLMHeadModel:
    torch.manual_seed(0)
    ssm_cfg = {"layer": layer, "d_state": 8} | ({"headdim": 8} if layer == "Mamba2" else {})
    config = MambaConfig(d_model=16, n_layer=2, vocab_size=50, ssm_cfg=ssm_cfg, **options)
    return MambaLMHeadModel(config).eval()


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("cuts", [[7, 1, 1, 1, 2], [1, 11], [4, 8], [2, 3, 7]])
def test_cached_calls_are_the_whole(name: str, cuts: list[int]) -> None:
    """A prompt, and then any numbers of tokens: also more than one, which the original refuses."""
    layer, x = mixer(name, layer_idx=3), torch.randn(2, 12, 16, dtype=torch.float64)
    params, outs = InferenceParams(max_seqlen=12, max_batch_size=2), []
    for part in x.split(cuts, dim=1):
        outs.append(layer(part, inference_params=params))
        params.seqlen_offset += part.shape[1]
    torch.testing.assert_close(torch.cat(outs, dim=1), layer(x))
    conv, ssm = params.key_value_memory_dict[3]
    fresh = layer.allocate_inference_cache(2, 12)
    assert [(a.shape, a.dtype) for a in (conv, ssm)] == [(a.shape, a.dtype) for a in fresh]
    _, *states = layer.step(x[:, :5], *fresh)
    out, *_ = layer.step(x[:, 5:], *states)
    torch.testing.assert_close(out, layer(x)[:, 5:])
    params.seqlen_offset = 0  # a new sequence begins
    torch.testing.assert_close(layer(x[:, :3], inference_params=params), layer(x[:, :3]))


def test_gradients_of_modules() -> None:
    for name in MIXERS:
        layer, x = mixer(name), torch.randn(1, 4, 16, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,), fast_mode=True), name
        layer(x).sum().backward()
        assert all(weight.grad.abs().sum() > 0 for weight in layer.parameters()), name


def test_packed_sequences_and_their_caches() -> None:
    layer = mixer("Mamba2", layer_idx=0)
    x, cuts = torch.randn(1, 9, 16, dtype=torch.float64), torch.tensor([0, 4, 9], dtype=torch.int32)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5], dtype=torch.int32)
    packed = InferenceParams(max_seqlen=20, max_batch_size=2)
    out = layer(x, seq_idx=seq_idx, cu_seqlens=cuts, inference_params=packed)
    torch.testing.assert_close(out, layer(x, seq_idx=seq_idx))
    torch.testing.assert_close(layer(x[0], seqlen=9, seq_idx=seq_idx), out[0])
    packed.seqlen_offset = 1
    token = torch.randn(2, 1, 16, dtype=torch.float64)
    then = layer(token, inference_params=packed)
    for i, part in enumerate(x.split([4, 5], dim=1)):
        whole = layer(torch.cat([part, token[i : i + 1]], dim=1))
        torch.testing.assert_close(out[:, cuts[i] : cuts[i + 1]], whole[:, :-1])
        torch.testing.assert_close(then[i], whole[0, -1:])


def test_initial_states_that_are_learnt() -> None:
    torch.manual_seed(0)
    layer = Mamba2Simple(16, d_state=4, headdim=8, learnable_init_states=True, dtype=torch.float64)
    twin = Mamba2(16, d_state=4, headdim=8, dtype=torch.float64)
    twin.load_state_dict({name: x for name, x in layer.state_dict().items() if name != "init_states"})
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), twin(x))
    with torch.no_grad():
        layer.init_states.normal_()
    conv, ssm = twin.allocate_inference_cache(2, 6)
    ssm[:] = layer.init_states
    torch.testing.assert_close(layer(x), twin.step(x, conv, ssm)[0])


def test_initialisation_and_marks() -> None:
    torch.manual_seed(0)
    first, second = Mamba(32), Mamba2(32, headdim=8, A_init_range=(2, 3), conv_init=0.1)
    steps = [torch.nn.functional.softplus(bias) for bias in (first.dt_proj.bias, second.dt_bias)]
    assert all(s.min() > 0.0009 and s.max() < 0.101 for s in steps)
    torch.testing.assert_close(first.A_log.exp(), torch.arange(1.0, 17.0).expand(64, -1))
    assert 2 <= second.A_log.exp().min() <= second.A_log.exp().max() <= 3
    assert second.conv1d.weight.abs().max() <= 0.1
    for x in (first.A_log, first.D, second.A_log, second.D, second.dt_bias):
        assert x._no_weight_decay
    half = Mamba(32, dtype=torch.bfloat16)
    assert (half.A_log.dtype, half.D.dtype, half.dt_proj.bias.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert half(torch.randn(1, 3, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    steps = Mamba(32, dt_init="constant", dt_scale=2.0).dt_proj.weight
    torch.testing.assert_close(steps, torch.full_like(steps, 2 * 2**-0.5))


def test_half_precision_by_autocast_and_checkpoints() -> None:
    from torch.utils.checkpoint import checkpoint

    for name in ("Mamba", "Mamba2"):
        layer, x = mixer(name).float(), torch.randn(2, 6, 16)
        right = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        assert (out - right).abs().max() < 0.03 * right.abs().max()
        x.requires_grad_()
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        again = x.grad.clone()
        x.grad = None
        layer(x).square().sum().backward()
        torch.testing.assert_close(again, x.grad)


def test_equal_to_transformers() -> None:
    """The logits of MambaForCausalLM and the output of its mixers, with equal weights."""
    transformers = pytest.importorskip("transformers")
    model = lm()
    config = transformers.MambaConfig(
        vocab_size=56, hidden_size=16, num_hidden_layers=2, state_size=8, time_step_rank=1, residual_in_fp32=True
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    weights = {name.replace("embedding.", "embeddings."): x for name, x in model.state_dict().items()}
    theirs.load_state_dict(weights)
    tokens = torch.randint(0, 50, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, theirs(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-6)
        for seqlen in (1, 6):
            x = torch.randn(2, seqlen, 16)
            torch.testing.assert_close(
                model.backbone.layers[0].mixer(x), theirs.backbone.layers[0].mixer(x), rtol=1e-5, atol=1e-6
            )
        config = transformers.Mamba2Config(
            vocab_size=56, hidden_size=16, num_hidden_layers=1, state_size=8, head_dim=8, num_heads=4, n_groups=2,
            chunk_size=4, expand=2,
        )  # fmt: skip
        mine, theirs = Mamba2(16, d_state=8, headdim=8, ngroups=2), transformers.Mamba2Model(config).layers[0].mixer
        with torch.no_grad():
            mine.load_state_dict(theirs.state_dict())
            x = torch.randn(2, 6, 16)
            torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("fused", [False, True])
def test_generation_is_that_of_whole_passes(layer: str, fused: bool) -> None:
    model = lm(layer, fused_add_norm=fused, residual_in_fp32=fused, d_intermediate=24)
    prompt = torch.randint(0, 50, (2, 5))
    out = model.generate(prompt, max_length=12, return_dict_in_generate=True, output_scores=True, vocab_size=50)
    tokens, scores = prompt, []
    with torch.no_grad():
        for _ in range(7):
            scores.append(model(tokens).logits[:, -1, :50])
            tokens = torch.cat([tokens, scores[-1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out.sequences, tokens)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(scores), rtol=1e-4, atol=1e-5)
    taught = torch.randint(0, 50, (2, 9))
    assert torch.equal(model.generate(taught[:, :4], 11, teacher_outputs=taught)[:, :9], taught)


def test_stops_streams_and_says_so(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got, self.ended = [], False

        def put(self, tokens: Any) -> None:
            self.got.append(tokens)

        def end(self) -> None:
            self.ended = True

    model, streamer = lm(), Streamer()
    prompt = torch.randint(0, 50, (1, 3))
    first = model.generate(prompt, 4)[0, -1].item()
    with caplog.at_level(logging.WARNING):
        out = [
            model.generate(prompt, 9, eos_token_id=first, streamer=streamer, cg=True, enable_timing=True) for _ in "ab"
        ]
    assert out[0].shape == (1, 4)
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.got[:2], dim=1), out[0])
    assert len([r for r in caplog.records if "cg=True" in r.message]) == 1
    assert "decoding took" in capsys.readouterr().out
    penalised = decode(prompt, model, 9, repetition_penalty=1e9).sequences
    assert len(set(penalised[0].tolist())) == len(set(prompt[0].tolist())) + 6  # no token again
    torch.manual_seed(3)
    drawn = model.generate(prompt, 9, top_k=0, temperature=2.0)
    torch.manual_seed(3)
    assert torch.equal(model.generate(prompt, 9, top_k=0, temperature=2.0), drawn)


def test_sets_of_tokens() -> None:
    p = torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.15]])
    rows = p.log().expand(4000, -1)
    torch.manual_seed(0)
    for options, kept in [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 0, "top_p": 0.69}, {1, 3}),
        ({"top_k": 0, "top_p": 0.71}, {1, 3, 4}),
        ({"top_k": 0, "min_p": 0.3}, {1, 3, 4}),
        ({"top_k": 4, "top_p": 0.5, "min_p": 0.9}, {1}),
        ({"top_k": 1, "temperature": 9.0}, {1}),
        ({"top_k": 0}, {0, 1, 2, 3, 4}),
    ]:
        assert set(sample(rows, **options).tolist()) == kept, options
    share = (sample(rows, top_k=0, temperature=0.5) == 1).double().mean()
    right = (0.16 / p.square().sum()).item()
    assert abs(share - right) < 5 * math.sqrt(right * (1 - right) / 4000)


def test_models_are_saved_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    for layer, tied in (("Mamba1", True), ("Mamba2", False)):
        model, folder, tokens = lm(layer, tie_embeddings=tied), tmp_path / layer, torch.arange(8)[None]
        model.save_pretrained(folder)
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        again = MambaLMHeadModel.from_pretrained(folder)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert (again.lm_head.weight is again.backbone.embedding.weight) == tied
        assert (
            MambaLMHeadModel.from_pretrained(str(folder), dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
        )
    weights = model.state_dict()  # sharded
    (folder / "model.safetensors").unlink()
    parts, names = [{}, {}], sorted(weights)
    for i, name in enumerate(names):
        parts[i % 2][name] = weights[name]
    for i, part in enumerate(parts):
        save_file(part, folder / f"part{i}.safetensors")
    index = {"weight_map": {name: f"part{i % 2}.safetensors" for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(MambaLMHeadModel.from_pretrained(folder)(tokens).logits, model(tokens).logits)
    index["weight_map"][names[0]] = "../Mamba1/model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected files of this folder"):
        MambaLMHeadModel.from_pretrained(folder)


def test_files_that_are_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'state-spaces/mamba-130m', expected a local directory"):
        MambaLMHeadModel.from_pretrained("state-spaces/mamba-130m")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"d_model": 16, "n_layer": 2, "vocab_size": 50}')
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has pytorch_model.bin, expected model.safetensors.*weights_only=True"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="has 'model_type', expected the fields of MambaConfig"):
        MambaLMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Mamba(16, dt_init="ones"), ValueError, "dt_init is 'ones'"),
        (lambda: Mamba2(16, headdim=5), ValueError, "headdim is 5"),
        (lambda: Mamba2(16, headdim=8, A_init_range=(2, 1)), ValueError, "A_init_range is (2, 1)"),
        (lambda: Mamba2(16, headdim=8, process_group="world"), NotImplementedError, "process_group is given"),
        (lambda: Mamba3(16), NotImplementedError, "Mamba3 is not provided"),
        (lambda: lm("Mamba4"), ValueError, "ssm_cfg has layer 'Mamba4'"),
        (lambda: lm(attn_layer_idx=[1]), NotImplementedError, "attn_layer_idx holds 1"),
        (lambda: Block(8, torch.nn.Identity, norm_cls=torch.nn.Identity, fused_add_norm=True), ValueError, "norm_cls makes Identity"),
        (lambda: Mamba(16)(torch.zeros(1, 2, 16), InferenceParams(4, 1)), ValueError, "layer_idx is None"),
        (lambda: lm().generate(torch.zeros(1, 4, dtype=torch.long), 4), ValueError, "max_length is 4, expected more than the 4"),
        (lambda: sample(torch.zeros(1, 3), top_k=2, top_p=1.5), ValueError, "top_p is 1.5"),
        (lambda: sample(torch.zeros(1, 3), top_k=2, temperature=0), ValueError, "temperature is 0"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_cache_of_another_batch() -> None:
    layer, params = mixer("Mamba2", layer_idx=0), InferenceParams(8, 2)
    layer(torch.zeros(2, 3, 16).double(), inference_params=params)
    params.seqlen_offset = 3
    with pytest.raises(ValueError, match="holds states of 2 sequences, expected 1"):
        layer(torch.zeros(1, 1, 16).double(), inference_params=params)
    with pytest.raises(ValueError, match="seq_idx or cu_seqlens is given where sequences go on"):
        layer(torch.zeros(2, 1, 16).double(), seq_idx=torch.zeros(2, 1, dtype=torch.int32), inference_params=params)


def test_a_block_as_research_code_makes_it() -> None:
    """By keywords of release 1, with and without the fused call."""
    torch.manual_seed(0)
    options = {"norm_cls": RMSNorm, "residual_in_fp32": True}
    block = Block(16, Mamba, fused_add_norm=True, **options)
    plain = Block(16, Mamba, fused_add_norm=False, **options)
    plain.load_state_dict(block.state_dict())
    x, stream = torch.randn(2, 2, 5, 16)
    for a, b in zip(block(x, stream), plain(x, stream), strict=True):
        torch.testing.assert_close(a, b)


INSTALL = """
import importlib.util, logging, sys
sys.path.insert(0, {folder!r})
records = []
handler = logging.Handler()
handler.emit = records.append
logging.getLogger("subquad_torch.stand_in").addHandler(handler)
from subquad_torch.mamba_ssm import install, uninstall
print(install() == install() == {names}, len(records))
"""


def test_install_gives_one_object_by_either_name(tmp_path: Path) -> None:
    code = (
        INSTALL.format(folder=str(tmp_path), names=("mamba_ssm", "causal_conv1d"))
        + """
import subquad_torch.mamba_ssm.ops.selective_scan_interface as ours
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from mamba_ssm.modules.mamba_simple import Mamba, Block
from mamba_ssm.modules.mamba2 import Mamba2
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.generation import InferenceParams
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
import mamba_ssm, subquad_torch.causal_conv1d
print(selective_scan_fn is ours.selective_scan_fn, causal_conv1d_fn is subquad_torch.causal_conv1d.causal_conv1d_fn,
      mamba_ssm.Mamba is Mamba, mamba_ssm.__spec__.name, importlib.util.find_spec("mamba_ssm.modules.mha"))
import importlib; importlib.reload(ours)
try: import mamba_ssm.modules.mha
except ModuleNotFoundError as error: print(error)
uninstall()
print([name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "causal_conv1d")])
try: import mamba_ssm
except ModuleNotFoundError as error: print(error)
print(install())
"""
    )
    assert python(code).splitlines() == [
        "True 1",
        "True True True subquad_torch.mamba_ssm None",
        "No module named 'mamba_ssm.modules.mha'",
        "[]",
        "No module named 'mamba_ssm'",
        "('mamba_ssm', 'causal_conv1d')",
    ]


def test_originals_stay_those_that_come_later_too(tmp_path: Path) -> None:
    later = tmp_path / "later"
    (later / "mamba_ssm").mkdir(parents=True)
    (later / "mamba_ssm" / "__init__.py").write_text("")
    (later / "mamba_ssm" / "ops.py").write_text("origin = 'the later original'\n")
    (tmp_path / "causal_conv1d.py").write_text("causal_conv1d_fn = 'the original'\n")
    code = (
        INSTALL.format(folder=str(tmp_path), names=("mamba_ssm",))
        + f"""
sys.path.insert(0, {str(later)!r})
from causal_conv1d import causal_conv1d_fn
import mamba_ssm.ops
print(causal_conv1d_fn, mamba_ssm.ops.origin)
print([record.getMessage().split(",")[0].split(" (")[0] for record in records])
uninstall()
print("causal_conv1d" in sys.modules, "mamba_ssm.ops" in sys.modules)
"""
    )
    assert python(code).splitlines() == [
        "True 2",
        "the original the later original",
        "['causal_conv1d is installed', \"not installed: mamba_ssm; from now on `import` gives subquad's functions of the same names\"]",
        "True True",
    ]


FAMILIES = """
import sys, torch, transformers
from transformers import *
small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, pad_token_id=0, eos_token_id=None)
hybrid = small | dict(intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
second = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=4)
models = [
    (MambaForCausalLM, MambaConfig(**small, state_size=8)),
    (FalconMambaForCausalLM, FalconMambaConfig(**small, state_size=8)),
    (Mamba2ForCausalLM, Mamba2Config(**small, state_size=8, head_dim=16, num_heads=4, n_groups=2, chunk_size=4)),
    (BambaForCausalLM, BambaConfig(**hybrid, **second, attn_layer_indices=[1])),
    (JambaForCausalLM, JambaConfig(**hybrid, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8)),
    (Zamba2ForCausalLM, Zamba2Config(**hybrid | {"num_key_value_heads": 4}, mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4,
                                     layers_block_type=["mamba", "hybrid"])),
    (FalconH1ForCausalLM, FalconH1Config(**hybrid, **second, mamba_d_ssm=64)),
]
outs = {}
for kind, config in models:
    torch.manual_seed(0)
    model, tokens = kind(config).eval(), torch.randint(1, 50, (2, 9))
    with torch.no_grad():
        for x in model.parameters(): x.add_(0.02 * torch.randn_like(x))
        logits, new = model(tokens, use_cache=False).logits, model.generate(tokens, max_new_tokens=5, do_sample=False)
    model.train(kind is not FalconMambaForCausalLM)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    outs[kind.__name__] = logits, new, torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])
torch.save(outs, path)
print(sorted(name for name in sys.modules if name == "mamba_ssm"))
"""


@pytest.mark.slow
def test_transformers_calls_them_and_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    paths = [tmp_path / "own.pt", tmp_path / "ours.pt"]
    own = f"path = {str(paths[0])!r}\n" + FAMILIES
    ours = f"from subquad_torch.mamba_ssm import install; install()\npath = {str(paths[1])!r}\n" + FAMILIES
    assert python(own).splitlines()[-1] == "[]"
    assert python(ours).splitlines()[-1] == "['mamba_ssm']"
    for name, (logits, tokens, gradients) in (found := torch.load(paths[0])).items():
        other = torch.load(paths[1])[name]
        torch.testing.assert_close(other[0], logits, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert torch.equal(other[1], tokens), name
        torch.testing.assert_close(other[2], gradients, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert len(found) == 7
