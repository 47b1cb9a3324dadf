"""Single rows of tensors in safetensors files, read without the rest of the file.

A file begins with the length of its header (8 bytes, little endian) and the header, a JSON object with dtype, shape and
place of each tensor; see https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from include.errors import BadRecipe

INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 2**16  # read ahead; a row of embeddings has some 10 kB
MAX_HEADER_BYTES = 100_000_000  # the library safetensors refuses longer ones


@dataclass(frozen=True)
class Matrix:
    """A tensor of two dimensions in a file.

    Attributes:
        path: the file.
        name: the tensor's name.
        rows: number of its rows.
        row_bytes: size of a row in bytes.
        begin: the first row's place in the file, in bytes.
    """

    path: str
    name: str
    rows: int
    row_bytes: int
    begin: int


def find_matrices(fs: Any, folder: str, endings: tuple[str, ...]) -> list[Matrix]:
    """Return the matrices of a model whose names end with one of `endings`, sorted by name.

    Args:
        fs: an fsspec file system.
        folder: the folder with `*.safetensors` and, if there are several, their index.

    Raises:
        BadRecipe: a file does not begin as a safetensors file does.
    """
    files = sorted(path for path in fs.ls(folder, detail=False) if path.endswith(".safetensors"))
    index = f"{folder}/{INDEX}"
    if len(files) > 1 and fs.exists(index):
        places = orjson.loads(fs.cat_file(index))["weight_map"]
        files = sorted({f"{folder}/{file}" for name, file in places.items() if name.endswith(endings)})
    found = []
    for path in files:
        with fs.open(path, "rb", block_size=BLOCK_BYTES) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            try:
                header = orjson.loads(file.read(header_bytes) if header_bytes <= MAX_HEADER_BYTES else b"")
            except orjson.JSONDecodeError:
                raise BadRecipe(
                    f"field 'base_model': {path} is not a safetensors file; it may be cut short, or a Git LFS pointer",
                    "Fetch the model's files again",
                ) from None
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            if name.endswith(endings) and len(shape := tensor["shape"]) == 2 and math.prod(shape):
                begin, end = tensor["data_offsets"]
                found.append(Matrix(path, name, shape[0], (end - begin) // shape[0], 8 + header_bytes + begin))
    return sorted(found, key=lambda matrix: matrix.name)


def read_matrix_rows(fs: Any, matrix: Matrix, rows: Iterable[int]) -> list[bytes]:
    """Return the bytes of some rows, in the order of `rows`."""
    with fs.open(matrix.path, "rb", block_size=BLOCK_BYTES) as file:
        found = []
        for row in rows:
            file.seek(matrix.begin + row * matrix.row_bytes)
            found.append(file.read(matrix.row_bytes))
    return found
