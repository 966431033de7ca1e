"""`accelerate` of transformers' recurrent layers: the original's numbers, and what the original gets wrong."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from asv_benchmarks.accelerate import errors  # noqa: E402
from asv_benchmarks.accelerate.families import CONFIGS, tiny_model  # noqa: E402
from subquad_torch.transformers import accelerate, explain, restore  # noqa: E402
from subquad_torch.transformers.accelerate import FAMILIES, recurrent  # noqa: E402

LIMIT = 1e-5
RESTARTS = ("Mamba", "FalconMamba", "Jamba")  # whose original restarts its state at a second chunk


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def original(family: str) -> Any:
    return tiny_model(family)


@pytest.fixture(scope="module")
def fast(family: str) -> Any:
    return accelerate(tiny_model(family))


def fast_model(family: str = "Mamba") -> Any:
    return accelerate(tiny_model(family))


def mixer_of(model: Any) -> Any:
    return next(x for x in model.modules() if isinstance(x, recurrent.Recurrent))


def test_logits_and_gradients_are_the_originals(original: Any, fast: Any) -> None:
    ids = errors.tokens(2, 16)
    with torch.no_grad():
        assert errors.relative(fast(ids).logits, original(ids).logits) < LIMIT
    assert errors.of_gradients(fast, original, ids) < LIMIT


def test_chunks_and_tokens_with_a_cache_are_one_pass(fast: Any) -> None:
    """Under `no_grad` one token of Mamba goes through `subquad.mamba`; where gradients are recorded it does not."""
    ids = errors.tokens(2, 16)
    with torch.no_grad():
        assert errors.of_chunks(fast, ids) < LIMIT
    assert errors.of_chunks(fast, ids) < LIMIT


@pytest.mark.parametrize("name", RESTARTS)
def test_the_original_restarts_at_a_chunk(name: str) -> None:
    """What the fast form does not reproduce; a release in which this fails has mended it, and docs must say so."""
    with torch.no_grad():
        assert errors.of_chunks(tiny_model(name), errors.tokens(2, 16)) > 0.05


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_single_prompts(fast: Any, family: str, side: str) -> None:
    with torch.no_grad():
        assert max(errors.of_padding(fast, family, side)) < LIMIT


def test_generate_gives_the_originals_tokens(original: Any, fast: Any) -> None:
    ids = errors.tokens(2, 7)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = fast.generate(ids, **how)
    if fast.config.model_type != "mamba2":  # whose own decoding ignores the limits of the step sizes
        assert torch.equal(expected, original.generate(ids, **how))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    assert torch.equal(fast.generate(padded, attention_mask=(padded > 0).long(), **how)[:, 3:], expected)


def test_a_cache_goes_on_in_the_original(original: Any, fast: Any, family: str) -> None:
    ids = errors.tokens(2, 12)
    with torch.no_grad():
        cache = fast(ids[:, :11], use_cache=True).cache
        place = torch.tensor([[11]])
        step = original(ids[:, 11:], cache=cache, position_ids=place, use_cache=True).logits[:, 0]
        whole = fast(ids).logits[:, 11]
    limit = LIMIT if family != "Mamba2" else 1.0  # the original's decoding ignores the limits of the step sizes
    assert errors.relative(step, whole) < limit


def test_explain_lists_what_runs(fast: Any) -> None:
    runs = [row.runs for row in explain(fast) if "compiled" in row.runs]
    assert runs
    assert all("causal_conv1d (compiled)" in text and "scan (compiled)" in text for text in runs)


def test_only_the_class_of_modules_changes_and_restore_undoes_it(family: str) -> None:
    model = tiny_model(family)
    before, classes = model.state_dict(), [type(x) for x in model.modules()]
    assert accelerate(model) is model
    names = [type(x).__name__ for x in model.modules()]
    assert [x.__name__ for x in classes] == names
    assert set(before) == set(model.state_dict())
    changed = [x for x, y in zip(classes, model.modules(), strict=True) if x is not type(y)]
    assert changed
    assert all(x.__name__ in FAMILIES for x in changed)
    accelerate(model)  # nothing left to do
    assert [type(x) for x in restore(model).modules()] == classes
    assert [type(x) for x in tiny_model(family).modules()] == classes


def test_copies_and_pickles_stay_fast(tmp_path: Any) -> None:
    model, ids = fast_model(), errors.tokens(1, 6)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    with torch.no_grad():
        expected = model(ids).logits
        for other in others:
            assert isinstance(mixer_of(other), recurrent.Recurrent)
            assert mixer_of(other) is not mixer_of(model)
            assert torch.equal(other(ids).logits, expected)
            restore(other)
    assert mixer_of(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert errors.relative(again(ids).logits, expected) < LIMIT


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Qwen3Next"])
def test_a_long_prompt_goes_through_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = fast_model(name), errors.tokens(2, 16)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, 9:] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=True)
        monkeypatch.setattr(recurrent, "PIECE", 5)
        pieces = model(ids, attention_mask=mask, use_cache=True)
        errors_ = [errors.relative(pieces.logits, whole.logits)]
        for part in ("conv_states", "recurrent_states"):
            x, y = (getattr(out.cache.layers[0], part)[0] for out in (pieces, whole))
            errors_.append(errors.relative(x, y))
    assert max(errors_) < LIMIT


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Qwen3Next"])
def test_a_cache_carries_gradients(name: str) -> None:
    """The cache is written in place: what autograd keeps of it must be a copy."""
    model, ids = fast_model(name), errors.tokens(1, 9)
    weight = mixer_of(model).A_log

    def gradient(*counts: int) -> Any:
        cache, total, start = None, 0.0, 0
        for count in counts:
            out = model(ids[:, start : start + count], cache=cache, use_cache=True)
            cache, start, total = out.cache, start + count, total + out.logits.square().sum()
        return torch.autograd.grad(total, weight)[0]

    assert errors.relative(gradient(4, 1, 3, 1), gradient(9)) < LIMIT


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Qwen3Next"])
def test_packed_documents_are_each_alone(name: str) -> None:
    mixer = mixer_of(fast_model(name))
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([mixer(x[:, :4]), mixer(x[:, 4:])], dim=1)
        for given in ({"seq_idx": torch.tensor([[0] * 4 + [1] * 5])}, {"cu_seq_lens_q": torch.tensor([0, 4, 9])}):
            assert errors.relative(mixer(x, **given), alone) < LIMIT
            assert errors.relative(mixer(x), alone) > 1e-2


def test_which_models_hand_documents_to_their_layers(family: str, fast: Any) -> None:
    """Four models of transformers drop ``seq_idx`` before their layers, as the page on accelerate says."""
    given: list[Any] = []
    hook = mixer_of(fast).register_forward_pre_hook(
        lambda _, args, kw: given.append(kw.get("seq_idx")), with_kwargs=True
    )
    with torch.no_grad():
        fast(errors.tokens(1, 6), seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]]), use_cache=False)
    hook.remove()
    assert (given[0] is None) == (family in ("Mamba", "Mamba2", "FalconMamba", "Jamba"))


@pytest.mark.parametrize("name", ["Mamba", "Jamba", "Mamba2", "Qwen3Next"])
def test_bfloat16_and_autocast_are_no_further_off_than_the_original(name: str) -> None:
    ids = errors.tokens(2, 16)
    model, own = fast_model(name), tiny_model(name)
    with torch.no_grad():
        exact = own(ids).logits
        half, own_half = copy.deepcopy(model).bfloat16(), copy.deepcopy(own).bfloat16()
        assert errors.relative(half(ids).logits, exact) < 1.2 * errors.relative(own_half(ids).logits, exact) + 1e-3
        assert errors.of_chunks(half, ids) < 0.05
        with torch.autocast("cpu", torch.bfloat16):
            assert errors.relative(model(ids).logits, exact) < 1.2 * errors.relative(own(ids).logits, exact) + 1e-3
            assert errors.of_chunks(model, ids) < 0.05


def test_checkpointed_training_has_the_same_gradients() -> None:
    model, ids = fast_model("Mamba2").train(), errors.tokens(2, 8)
    expected = errors.gradients(model, ids)
    model.activation_checkpointing_enable()
    found = errors.gradients(model, ids)
    assert max(errors.relative(found[name], x) for name, x in expected.items()) < LIMIT
    with torch.autocast("cpu", torch.bfloat16):
        assert all(x.isfinite().all() for x in errors.gradients(model, ids).values())


@pytest.mark.parametrize("name", ["Mamba", pytest.param("Mamba2", marks=pytest.mark.slow)])
def test_compiles(name: str) -> None:
    model, ids = fast_model(name), errors.tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert errors.relative(compiled(ids, attention_mask=mask, use_cache=False).logits, expected) < LIMIT


def test_a_token_after_reset_starts_anew() -> None:
    model, ids = fast_model("Mamba"), errors.tokens(1, 5)
    with torch.no_grad():
        out = model(ids, use_cache=True)
        out.cache.reset()
        again = model(ids[:, :3], cache=out.cache, use_cache=True)
        assert errors.relative(again.logits, out.logits[:, :3]) < LIMIT


def test_what_cannot_be_accelerated_raises_and_changes_nothing() -> None:
    with pytest.raises(TypeError, match=r"model is str, expected a torch\.nn\.Module"):
        accelerate("mamba")  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"found modules of torch alone, expected one of BambaMixer, .*Zamba2"):
        accelerate(torch.nn.Linear(2, 2))
    model = tiny_model("Mamba")
    mixer = model.backbone.layers[1].mixer
    mixer.activation = "gelu"
    with pytest.raises(ValueError, match=r"backbone\.layers\.1\.mixer \(MambaMixer\): its activation is 'gelu'"):
        accelerate(model)
    mixer.activation, mixer.forward = "silu", mixer.forward
    with pytest.raises(ValueError, match="its forward has been replaced by another package"):
        accelerate(model)
    assert not any(isinstance(x, recurrent.Recurrent) for x in model.modules())


def test_hooks_of_offloading_reach_the_fast_form() -> None:
    """The package accelerate puts a forward of its own on an instance, which calls ``_old_forward`` of that."""
    model, calls = tiny_model("Mamba"), []
    for layer in model.backbone.layers:
        mixer = layer.mixer
        mixer._old_forward = mixer.forward
        mixer.forward = lambda *args, m=mixer, **kwargs: (calls.append(m), m._old_forward(*args, **kwargs))[1]
    ids = errors.tokens(1, 16)
    with torch.no_grad():
        assert errors.of_chunks(accelerate(model), ids) < LIMIT
        assert len(calls) == 8
        assert torch.equal(restore(model)(ids).logits, tiny_model("Mamba")(ids).logits)


def test_a_class_with_a_forward_of_its_own_is_left_alone() -> None:
    model = tiny_model("Mamba")
    mixer = model.backbone.layers[0].mixer
    own = type("OwnMixer", (type(mixer),), {"forward": lambda self, x, **_: x})
    mixer.__class__ = own
    accelerate(model)
    assert type(mixer) is own
    assert isinstance(model.backbone.layers[1].mixer, recurrent.Recurrent)
    mixer.__class__ = type("Plain", (own.__mro__[1],), {})
    assert isinstance(accelerate(model).backbone.layers[0].mixer, recurrent.Recurrent)


def test_single_tokens_take_a_mask_of_the_whole_length() -> None:
    """The original's convolution takes such a token once for each column of the mask."""
    model, own, ids = fast_model(), tiny_model("Mamba"), errors.tokens(1, 8)

    def last(model: Any) -> Any:
        cache = model(ids[:, :5], use_cache=True).cache
        for t in range(5, 8):
            out = model(ids[:, t : t + 1], cache=cache, attention_mask=torch.ones(1, t + 1), use_cache=True).logits
        return out[:, 0]

    with torch.no_grad():
        whole = model(ids).logits[:, 7]
        assert errors.relative(last(model), whole) < LIMIT
        assert errors.relative(last(own), whole) > 0.5


def test_a_mask_of_another_shape_raises() -> None:
    model, ids = fast_model(), errors.tokens(2, 5)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\), expected \(2, n\) with n at least the 5"):
        model(ids, attention_mask=torch.ones(2, 3))
