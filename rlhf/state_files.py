"""States made of tensors and plain values, on disk without pickle: safetensors, with the structure as JSON inside.

Optimisers, schedulers and random generators keep their state in nested dicts, lists and tuples. torch.save would
pickle them, and reading a pickle can run whatever its writer put there.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

STRUCTURE = "structure"


def save_tree(tree: object, path: str | Path) -> None:
    """Write nested dicts, lists and tuples of tensors, arrays, numbers, strings, booleans and None.

    Raises:
        ValueError: anything else, such as a function or an object of a class.
    """
    tensors: dict[str, Tensor] = {}
    structure = _encode(tree, tensors)
    save_file(tensors, path, metadata={STRUCTURE: json.dumps(structure)})


def load_tree(path: str | Path) -> object:
    """Read what `save_tree` wrote, tensors on the CPU, every type and every bit as it was."""
    with safe_open(path, framework="pt") as file:
        structure = json.loads(file.metadata()[STRUCTURE])
        return _decode(structure, file.get_tensor)


def _encode(tree: object, tensors: dict[str, Tensor]) -> object:
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if isinstance(tree, Tensor | np.ndarray):
        kind, name = ("tensor", str(len(tensors))) if isinstance(tree, Tensor) else ("array", str(len(tensors)))
        # A copy: two names may not share memory in a safetensors file.
        tensors[name] = torch.as_tensor(tree).detach().cpu().clone().contiguous()
        return {kind: name}
    if isinstance(tree, np.generic):
        return _encode(tree.item(), tensors)
    if isinstance(tree, dict):
        # Pairs, because the keys of an optimiser's state are numbers, which JSON would turn into text.
        return {"dict": [[_encode(key, tensors), _encode(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        items = [_encode(item, tensors) for item in tree]
        return items if isinstance(tree, list) else {"tuple": items}
    raise ValueError(f"a state holds a {type(tree).__name__}, which cannot be written without pickle")


def _decode(structure: object, tensor: object) -> object:
    if isinstance(structure, list):
        return [_decode(item, tensor) for item in structure]
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "array":
        return tensor(content).numpy()
    if kind == "tuple":
        return tuple(_decode(item, tensor) for item in content)
    return {_decode(key, tensor): _decode(value, tensor) for key, value in content}
