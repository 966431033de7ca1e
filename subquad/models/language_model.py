"""A language model as its users have it: logits, generation, streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from subquad.backend import Array
from subquad.core.beside import namespace_of, place_of
from subquad.core.checks import check_count, check_seed
from subquad.core.loading import library_of
from subquad.models.config import ModelConfig
from subquad.models.forward import State, check_state, mamba_logits
from subquad.models.generation import Row, Stops, decode, rows_of, stops_of
from subquad.models.parameters import Params
from subquad.models.sampling import Sampler
from subquad.models.source import Host
from subquad.models.tokens import encode, padded, prompts_of

MAX_NEW = 128  # tokens that are generated unless a call says how many


class LanguageModel:
    """A language model of Mamba or Mamba-2 blocks: its parameters, on one array library, and what is asked of it.

    Parameters
    ----------
    params : mapping
        The parameters, as `subquad.models.mamba_logits` takes them.
    config : ModelConfig
        The sizes and options.
    tokenizer : tokenizers.Tokenizer, optional
        What turns text into tokens and back. Default: prompts are numbers.

    See Also
    --------
    subquad.load_model : Read a model from its files.

    Examples
    --------
    A model of random weights, from a config alone:

    >>> import numpy as np
    >>> from subquad.models import LanguageModel, ModelConfig, init_params
    >>> config = ModelConfig("mamba", d_model=16, n_layers=2, vocab_size=50, d_inner=32, d_state=4, d_conv=4, dt_rank=1)
    >>> model = LanguageModel(init_params(config, seed=0), config)
    >>> model.logits([3, 1, 4, 1]).shape
    (4, 50)
    >>> len(model.generate([3, 1, 4, 1], max_new=6, temperature=1.0, seed=7))
    10
    """

    def __init__(self, params: Params, config: ModelConfig, tokenizer: Any = None) -> None:
        self.params, self.config, self.tokenizer = params, config, tokenizer
        table = params["embedding.weight"]
        self._xp, self._place = namespace_of(table), place_of(table)

    def __reduce__(self) -> tuple[Any, ...]:  # modules, such as an array namespace, can be neither pickled nor copied
        return type(self), (self.params, self.config, self.tokenizer)

    def __repr__(self) -> str:
        c, table = self.config, self.params["embedding.weight"]
        held = f"{library_of(self._xp)}, {str(table.dtype).rpartition('.')[2]}"
        return f"LanguageModel({c.kind}, {c.n_layers} layers, d_model={c.d_model}, vocab_size={c.vocab_size}; {held})"

    def logits(
        self,
        tokens: Any,
        state: State | None = None,
        *,
        return_state: bool = False,
        mask: Array | None = None,
        segments: Array | None = None,
        num_last_tokens: int = 0,
        implementation: str = "auto",
    ) -> Any:
        """Compute the logits of the next token after each token.

        Parameters
        ----------
        tokens : str, list of int, list of lists, or array of int, shape (..., n)
            Text, or numbers of tokens. Lists of a batch must have one length; give shorter ones a `mask`.
        state : tuple of dict, optional
            What an earlier call returned: the tokens continue its sequence. Default: the beginning of a text.
        return_state : bool, default False
            Return (logits, state) instead of logits.
        mask : array of bool, shape (..., n), optional
            False for a padded token, which changes no state, and whose logits mean nothing.
        segments : array of int, shape (..., n), optional
            Numbers of documents: states start anew before a token whose number differs from that before it.
        num_last_tokens : int, default 0
            Compute the logits of so many tokens at the end alone; 0: of all.
        implementation : str, default "auto"
            "auto", "generic", or the name of an override of all kernels of the blocks.

        Returns
        -------
        logits : array, shape (..., n, vocab_size)
            In float32, or float64 where the parameters are.
        state : tuple of dict
            Only with `return_state`: as the `state` of the next call, of any number of tokens, it continues the text.

        Raises
        ------
        TypeError
            If the tokens are none, or arrays are of another library.
        ValueError
            If shapes do not fit, a token is not in the vocabulary, or text is given and there is no tokenizer.

        See Also
        --------
        subquad.models.mamba_logits : The function of parameters that this calls.
        """
        return mamba_logits(
            self._tokens(tokens), self.params, self.config, state=state, return_state=return_state,
            mask=self._array(mask), segments=self._array(segments), num_last_tokens=num_last_tokens,
            implementation=implementation,
        )  # fmt: skip

    def generate(
        self,
        tokens: Any,
        *,
        max_new: int = MAX_NEW,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Any = None,
        seed: int = 0,
        state: State | None = None,
    ) -> Any:
        """Continue a prompt, or a batch of prompts of any lengths.

        Parameters
        ----------
        tokens : str, list of int, array of int, or a list of prompts
            The prompt, as text or as numbers of tokens, or several of one kind.
        max_new : int, default 128
            The most tokens that are added.
        temperature : float, default 0.0
            0 takes the likeliest token each time; otherwise tokens are drawn from p ∝ exp(logits / temperature).
        top_k : int, optional
            Draw among the k likeliest tokens alone.
        top_p : float, optional
            Draw among the fewest tokens, from the likeliest on, whose probabilities sum to top_p or more (nucleus
            sampling); after `top_k`.
        stop : int, str, or a list of these, optional
            What ends a text, and is the last of it: numbers of tokens, in place of the model's own end-of-text
            tokens, and strings, beside these. Default: the model's own; an empty list: nothing.
        seed : int, default 0
            Seed of the draws. Tokens are the same on every library, but for the rounding of logits.
        state : tuple of dict, optional
            What `logits` returned for the tokens before these. Default: the beginning of a text.

        Returns
        -------
        str, list of int, or a list of these
            The prompt and what follows, in the form of the prompt; for a batch, one for each prompt.

        Raises
        ------
        TypeError
            If an argument has no such form.
        ValueError
            If a number is out of its range, a prompt is empty, text is given without a tokenizer, or `top_k` or
            `top_p` is given without a temperature.

        See Also
        --------
        stream : The new tokens as they come.

        Notes
        -----
        A batch is padded on the left by a mask, so that a text does not depend on the others. The k-th prompt draws by
        (seed, k).
        """
        prompts, alone, text = prompts_of(tokens, self.tokenizer)
        steps, rows = self._decode(prompts, max_new, temperature, top_k, top_p, stop, seed, state, text=text)
        texts = [list(prompt) for prompt in prompts]
        for chosen in steps:
            for row, token in zip(texts, chosen, strict=True):
                row += [] if token is None else [token]
        if text:
            given = [tokens] if alone else tokens
            results: list[Any] = [prompt + "".join(row.pieces) for prompt, row in zip(given, rows, strict=True)]
        else:
            results = texts
        return results[0] if alone else results

    def stream(
        self,
        tokens: Any,
        *,
        max_new: int = MAX_NEW,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Any = None,
        seed: int = 0,
        state: State | None = None,
    ) -> Iterator[Any]:
        """Continue a prompt, and yield what is new as it comes.

        Parameters
        ----------
        tokens : str, list of int, array of int, or a list of prompts
            As `generate` takes it, and so are all others.
        max_new : int, default 128
            The most tokens that are added.
        temperature : float, default 0.0
            0, or the divisor of the logits.
        top_k : int, optional
            Draw among the k likeliest tokens alone.
        top_p : float, optional
            Draw among the fewest tokens whose probabilities sum to top_p or more.
        stop : int, str, or a list of these, optional
            What ends a text.
        seed : int, default 0
            Seed of the draws.
        state : tuple of dict, optional
            What `logits` returned for the tokens before these.

        Yields
        ------
        int or str, or a list of these
            The next token, or for text the characters that it completes, which may be "". For a batch, a list of one
            for each prompt, None for a text that has ended.

        Raises
        ------
        TypeError, ValueError
            As by `generate`, at the call.

        See Also
        --------
        generate : All at once.
        """
        prompts, alone, text = prompts_of(tokens, self.tokenizer)
        steps, rows = self._decode(prompts, max_new, temperature, top_k, top_p, stop, seed, state, text=text)
        return _pieces(steps, rows, alone=alone, text=text)

    def _decode(
        self, prompts: list[list[int]], max_new: Any, temperature: Any, top_k: Any, top_p: Any, stop: Any, seed: Any,
        state: Any, *, text: bool,
    ) -> tuple[Iterator[list[int | None]], list[Row]]:  # fmt: skip
        """The steps of a generation, and its rows, after checks of all arguments."""
        sampler, max_new = Sampler(temperature, top_k, top_p), check_count("max_new", max_new)
        stops: Stops = stops_of(stop, self.config.eos, self.tokenizer)
        for prompt in prompts:
            for token in prompt:
                if not 0 <= token < self.config.vocab_size:
                    msg = f"a prompt holds {token}, expected numbers in 0 … {self.config.vocab_size - 1}"
                    raise ValueError(msg)
        self._check_batch(state, len(prompts))
        rows = rows_of(prompts, stops, check_seed(seed), self.tokenizer, text=text)
        return decode(self._last_logits, *padded(prompts), state, rows, sampler, max_new), rows

    def _check_batch(self, state: Any, count: int) -> None:
        """Raise ValueError unless a state is of one text or of as many texts as there are prompts."""
        for layer in check_state(state, self.config.n_layers):
            conv = layer.get("conv") if isinstance(layer, Mapping) else None  # the block reports what is none
            batch = () if conv is None else tuple(conv.shape[:-2])
            if batch not in ((), (1,), (count,)):
                msg = f"state is of a batch of shape {batch}, expected that of one text, or of {count} as the prompts"
                raise ValueError(msg)

    def _last_logits(self, tokens: Host, mask: Host | None, state: Any) -> tuple[Array, State]:
        """(logits of the last token of each row, of the tokens that exist; state)."""
        logits, state = mamba_logits(
            self._array(tokens), self.params, self.config, state=state, mask=self._array(mask), return_state=True,
            num_last_tokens=1,
        )  # fmt: skip
        return logits[:, 0, : self.config.used_vocab or self.config.vocab_size], state

    def _tokens(self, tokens: Any) -> Array:
        """Tokens of any form as an array beside the parameters; one of any library but NumPy is left as it is."""
        if isinstance(tokens, str):
            tokens = encode(self.tokenizer, tokens)
        if isinstance(tokens, list | tuple):
            prompts, alone, _ = prompts_of(tokens, self.tokenizer)
            if len({len(prompt) for prompt in prompts}) > 1:
                msg = "tokens holds lists of several lengths; pad them, and say so by mask, or call generate"
                raise ValueError(msg)
            tokens = np.asarray(prompts[0] if alone else prompts)
        if isinstance(tokens, np.ndarray) and tokens.dtype.kind in "iu":
            beyond = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
            if beyond.size:
                msg = f"tokens holds {beyond[0]}, expected numbers in 0 … {self.config.vocab_size - 1}"
                raise ValueError(msg)
            tokens = tokens.astype(np.int32)
        return self._array(tokens)

    def _array(self, x: Any) -> Any:
        """A NumPy array as one beside the parameters: numbers of tokens and masks come from the host."""
        return self._xp.asarray(x, device=self._place) if isinstance(x, np.ndarray) else x


def _pieces(steps: Iterator[list[int | None]], rows: list[Row], *, alone: bool, text: bool) -> Iterator[Any]:
    for chosen in steps:
        new: list[Any] = list(chosen)
        if text:
            new = [None if token is None else row.pieces[-1] for row, token in zip(rows, chosen, strict=True)]
        yield new[0] if alone else new
