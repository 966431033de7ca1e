"""Models from files: a directory of transformers or mamba-ssm, or a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from subquad.backend import Array
from subquad.models.directories import read_directory
from subquad.models.gguf_files import read_gguf
from subquad.models.gguf_tokenizer import tokenizer_of
from subquad.models.language_model import LanguageModel
from subquad.models.parameters import tree_of
from subquad.models.placing import Placing
from subquad.models.tokens import read_tokenizer


def load_model(path: str | os.PathLike[str], *, like: Array | None = None, dtype: Any = None) -> LanguageModel:
    """Load a language model of Mamba or Mamba-2 blocks with its published weights, on any array library.

    Parameters
    ----------
    path : str or path
        A directory with a config.json and .safetensors files, of transformers, mlx-lm or mamba-ssm, or a .gguf file.
    like : array, optional
        The parameters become arrays of its library, on its device. Default: NumPy.
    dtype : str or dtype, optional
        The dtype of matrices: "float32", "float64", "float16" or "bfloat16", or a dtype of that name. All other
        parameters have float32, or float64 with these. Default: as stored, and float32 where the library lacks that or
        the file has quantised numbers.

    Returns
    -------
    LanguageModel
        The model, with the tokenizer of a directory's tokenizer.json, or of a GGUF file that holds byte-level BPE as
        GPT-2's.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ModuleNotFoundError
        If a package of the extra ``models`` is not installed that the format needs.
    ValueError
        If a model is of another kind, a file is damaged, a tensor is missing, unknown or of a shape that the config
        does not have, or weights are in a pickle; the message names the file and the tensor.

    See Also
    --------
    subquad.models.LanguageModel : What is returned.
    subquad.mamba, subquad.mamba2 : The blocks.

    Notes
    -----
    Files need not be trusted. Nothing in them is run: weights in pickles are refused. Shapes are compared with the
    config before anything is made of their size.

    Examples
    --------
    >>> import subquad
    >>> model = subquad.load_model("mamba-130m-hf")  # doctest: +SKIP
    >>> model.generate("The capital of France is", max_new=8)  # doctest: +SKIP
    'The capital of France is Paris, and the city is the'
    """
    where, placing = Path(path), Placing(like, dtype)
    if not where.exists():
        msg = f"path is {str(where)!r}, which does not exist; nothing is downloaded"
        raise FileNotFoundError(msg)
    if where.is_dir():
        config, read = read_directory(where)
        tokenizer = read_tokenizer(where)
    elif where.suffix == ".gguf":
        config, read, header = read_gguf(where)
        tokenizer = tokenizer_of(header)
    else:
        msg = f"path is the file {str(where)!r}, expected a directory with a config.json, or a file that ends in .gguf"
        raise ValueError(msg)
    params = tree_of(config, lambda name: placing.place(name, read(name)))
    return LanguageModel(params, config, tokenizer)
