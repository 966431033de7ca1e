"""A language model of Mamba blocks: embedding, residual blocks with a norm before each, a norm, a head.

x = embedding[tokens]
x ← x + mixer(rms_norm(x))        for each layer
logits = rms_norm(x) headᵀ
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

from subquad.backend import Array, Backend
from subquad.blocks import mamba, mamba2
from subquad.blocks.mamba_layers import can_step, step_layers
from subquad.blocks.parameters import project
from subquad.core.beside import namespace_of
from subquad.core.checks import check_arrays, check_count, check_flag
from subquad.core.dtypes import cast, compute_dtype, is_dtype
from subquad.core.loading import backend_of
from subquad.models.config import ModelConfig
from subquad.models.parameters import Params

State = tuple[dict[str, Array], ...]


def mamba_logits(
    tokens: Array,
    params: Params,
    config: ModelConfig,
    /,
    *,
    state: State | None = None,
    return_state: bool = False,
    mask: Array | None = None,
    segments: Array | None = None,
    num_last_tokens: int = 0,
    implementation: str = "auto",
) -> Any:
    """Compute the logits of a language model of Mamba or Mamba-2 blocks, a pure function of tokens and parameters.

        x = embedding[tokens]
        x ← x + mixer(norm.weight ∘ x / √(mean(x²) + eps))        for each layer
        logits = norm_f.weight ∘ x / √(mean(x²) + eps) headᵀ

    Parameters
    ----------
    tokens : array of int, shape (..., n)
        Numbers of tokens.
    params : mapping
        The parameters: "embedding.weight" (vocab_size, d_model), "norm_f.weight" (d_model,), "lm_head.weight" as the
        embedding unless that is the head too, and "layers", one mapping for each layer with "norm.weight" (d_model,)
        and "mixer", the parameters of `subquad.mamba` or `subquad.mamba2`.
    config : ModelConfig
        The sizes and options.
    state : tuple of dict, optional
        What an earlier call returned, one state of a block for each layer. Default: zeros.
    return_state : bool, default False
        Return (logits, state) instead of logits.
    mask : array of bool, shape (..., n), optional
        False for a padded token, which changes no state, and whose logits mean nothing.
    segments : array of int, shape (..., n), optional
        Numbers of documents: all states start anew before a token whose number differs from that of the token before.
    num_last_tokens : int, default 0
        Compute the logits of so many tokens at the end alone; 0: of all.
    implementation : str, default "auto"
        "auto", "generic", or the name of an override of all kernels of the blocks.

    Returns
    -------
    logits : array, shape (..., n, vocab_size)
        In float32, or float64 where the parameters are; with `num_last_tokens`, of the last tokens.
    state : tuple of dict
        Only with `return_state`: as the `state` of the next call, of any number of tokens, it continues the sequence.

    Raises
    ------
    TypeError
        If `tokens` is no array of integers of the library of the parameters.
    ValueError
        If shapes do not fit, a token is not in the vocabulary (where its value is known), or `state` has not one entry
        for each layer.

    See Also
    --------
    subquad.load_model : A model with its parameters.
    subquad.mamba : The block.

    Notes
    -----
    Activations, and so the residual stream, have float32 whatever the dtype of the parameters: a config with
    residual_in_fp32 asks for less. float64 stays float64.

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4.
    """
    xp, tokens = check_tokens(tokens, params, config)
    backend, last = backend_of(xp), check_count("num_last_tokens", num_last_tokens, least=0)
    return_state = check_flag("return_state", return_state)
    layers = params["layers"]
    states = check_state(state, len(layers))
    block = block_program(backend, config, implementation)
    new: list[dict[str, Array]] = []
    x = embed(xp, tokens, params)
    one_step = config.kind == "mamba" and x.shape[-2] == 1 and mask is None and segments is None
    if one_step and implementation == "auto" and can_step(layers, states):
        x, after_all = step_program(backend, config.norm_eps)(x, tuple(layers), tuple(states))
        new += after_all
        layers = states = ()
    for layer, before in zip(layers, states, strict=True):
        x, after = block(x, layer, before, mask, segments)
        new.append(after)
    if last:
        x = x[..., -last:, :]
    head = params["embedding.weight" if config.tied else "lm_head.weight"]
    logits = head_program(backend, config.norm_eps)(x, params["norm_f.weight"], head)
    return (logits, tuple(new)) if return_state else logits


def check_tokens(tokens: Array, params: Params, config: ModelConfig) -> tuple[ModuleType, Array]:
    """(array namespace of the parameters, tokens in a dtype that every library takes rows by).

    Errors unless the tokens are numbers of the vocabulary, beside the parameters.
    """
    table = params["embedding.weight"]
    xp = check_arrays(tokens=tokens, **{"params['embedding.weight']": table})
    if not is_dtype(xp, tokens.dtype, "integral"):
        msg = f"tokens has dtype {tokens.dtype}, expected integers"
        raise TypeError(msg)
    if tokens.ndim < 1:
        msg = "tokens has shape (), expected (..., n)"
        raise ValueError(msg)
    if tokens.dtype not in (xp.int32, xp.int64):
        tokens = xp.astype(tokens, xp.asarray(0).dtype)
    if tokens.shape[-1] and 0 not in tokens.shape and backend_of(xp).is_concrete(tokens):
        low, high = int(xp.min(tokens)), int(xp.max(tokens))
        if low < 0 or high >= config.vocab_size:
            msg = f"tokens holds {low if low < 0 else high}, expected numbers in 0 … {config.vocab_size - 1}"
            raise ValueError(msg)
    return xp, tokens


def check_state(state: State | None, layers: int) -> State | tuple[None, ...]:
    """The state of each layer, None at the beginning; TypeError or ValueError for what no call has returned."""
    if state is None:
        return (None,) * layers
    if not isinstance(state, tuple | list):
        msg = f"state is a {type(state).__name__}, expected what an earlier call returned with return_state=True"
        raise TypeError(msg)
    if len(state) != layers:
        msg = f"state has {len(state)} entries, expected one for each of the {layers} layers"
        raise ValueError(msg)
    return tuple(state)


def embed(xp: ModuleType, tokens: Array, params: Params) -> Array:
    """The rows of the embedding, in the dtype to compute in."""
    table = params["embedding.weight"]
    dtype = compute_dtype(xp, table, params["norm_f.weight"])
    flat = xp.reshape(tokens, (-1,))
    rows = cast(xp, xp.take(table, flat, axis=0), dtype)
    assert rows is not None
    return xp.reshape(rows, (*tokens.shape, table.shape[1]))


def rms_norm(xp: ModuleType, x: Array, weight: Array, eps: float) -> Array:
    """weight ∘ x / √(mean(x²) + eps), over the last axis."""
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


@lru_cache(maxsize=64)
def block_program(backend: Backend, config: ModelConfig, implementation: str) -> Callable[..., Any]:
    """The function (x, layer, state, mask, segments) → (x + mixer(norm(x)), state), a program where libraries have it.

    The layers of a model have equal shapes, so that a library which compiles meets one program for all.
    """
    options: dict[str, Any] = {"implementation": implementation, "return_state": True}
    if config.kind == "mamba2":
        options |= {
            "groups": config.groups,
            "delta_limits": config.delta_limits,
            "norm_eps": config.norm_eps,
            "norm_before_gate": config.norm_before_gate,
        }
    mixer: Callable[..., Any] = mamba2 if config.kind == "mamba2" else mamba

    def residual_block(x: Array, layer: Params, state: Any, mask: Any, segments: Any) -> tuple[Array, dict[str, Array]]:
        xp = namespace_of(x)
        with backend.computing(x):
            normed = rms_norm(xp, x, layer["norm.weight"], config.norm_eps)
        out, state = mixer(normed, layer["mixer"], state=state, mask=mask, segments=segments, **options)
        return x + out, state

    return backend.as_program(residual_block)


@lru_cache(maxsize=64)
def step_program(backend: Backend, eps: float) -> Callable[..., Any]:
    """The function (x, layers, states) → (x, states) of one token, a program where libraries have it."""

    def step(x: Array, layers: tuple[Params, ...], states: State) -> tuple[Array, State]:
        return step_layers(x, layers, states, eps)

    return backend.as_program(step)


@lru_cache(maxsize=64)
def head_program(backend: Backend, eps: float) -> Callable[..., Any]:
    """The function (x, norm, head) → rms_norm(x) headᵀ, a program where libraries have it."""

    def logits(x: Array, norm: Array, head: Array) -> Array:
        xp = namespace_of(x)
        with backend.computing(x):
            x = rms_norm(xp, x, norm, eps)
            *batch, n, d = x.shape
            flat = xp.reshape(x, (1, -1, d))
            return xp.reshape(project(flat, head), (*batch, n, head.shape[0]))

    return backend.as_program(logits)
