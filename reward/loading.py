"""Models, tokenizers and configs from a folder or the hub: weights as safetensors, no foreign code unless it is asked
for, and one clear error where files are missing, damaged or do not fit together.

Every other file loads through here, so that there is one place to look for what a stranger's folder may do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

# Parts of a trunk that some checkpoints lack and that nothing here reads.
UNREAD = ("pooler.",)
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ONLY_SAFETENSORS = "pickled weights can run code and are not opened; save the model with save_pretrained first"


def load_config(place: str | Path, *, trust_remote_code: bool = False, **hub: Any) -> PreTrainedConfig:
    """The config of a model.

    Raises:
        ValueError, OSError: there is none, or it is damaged.
    """
    with clear_errors(f"the config of {place}"):
        return AutoConfig.from_pretrained(str(place), trust_remote_code=trust_remote_code, **hub)


def load_tokenizer(place: str | Path, *, trust_remote_code: bool = False, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        ValueError, OSError: there is none, or it is damaged.
    """
    with clear_errors(f"the tokenizer of {place}"):
        return AutoTokenizer.from_pretrained(str(place), trust_remote_code=trust_remote_code, **hub)


def load_model(
    model_class: Any, place: str | Path, *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """A model with every weight that it reads.

    transformers fills absent weights with random numbers and warns; a judge or a policy made of these would answer all
    the same.

    Args:
        model_class: Of transformers, `AutoModelForCausalLM` for example, or one of ours.
        place: Folder or hub id.
        trust_remote_code: Allow models that ship their own Python code.
        options: Further arguments of `from_pretrained`.

    Raises:
        ValueError, OSError: no safetensors, weights that are absent or of another shape, or damaged files.
    """
    _check_safetensors(place)
    with clear_errors(f"the model {place}"):
        model, loaded = model_class.from_pretrained(
            str(place),
            **options | {"trust_remote_code": trust_remote_code, "use_safetensors": True, "output_loading_info": True},
        )
    absent = sorted(name for name in loaded["missing_keys"] if not any(part in name for part in UNREAD))
    if absent:
        raise ValueError(
            f"{place} lacks {len(absent)} weights of a {type(model).__name__}, such as {absent[0]}: it holds another "
            "kind of model, or only a part of one"
        )
    return model


def load_adapter(model: PreTrainedModel, place: str | Path) -> PeftModel:
    """A model under the PEFT adapter of a folder or hub id.

    Raises:
        ValueError, OSError: no safetensors, an adapter of another model, or damaged files.
    """
    if cached_file(str(place), ADAPTER_WEIGHTS, _raise_exceptions_for_missing_entries=False) is None:
        raise ValueError(f"the adapter {place} has no {ADAPTER_WEIGHTS}; {ONLY_SAFETENSORS}")
    with clear_errors(f"the adapter {place}"):
        return PeftModel.from_pretrained(model, str(place))


@contextmanager
def clear_errors(what: str) -> Iterator[None]:
    """Turns whatever a damaged file makes a library raise into one ValueError that says which file it was.

    Errors that already speak to the user, ValueError and OSError, pass; so does want of memory.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    # Decoding errors are ValueErrors too, but speak of bytes and columns, not of a file.
    except (UnicodeDecodeError, JSONDecodeError) as error:
        raise _damaged(what, error) from error
    except (ValueError, OSError):
        raise
    # A torn file meets KeyError, TypeError, RuntimeError and errors of compiled code, depending on where it is torn.
    except Exception as error:
        raise _damaged(what, error) from error


def _damaged(what: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"cannot open {what}: its files are damaged or do not fit together ({type(error).__name__}: {reason}); "
        "copy or save them again"
    )


def _check_safetensors(place: str | Path) -> None:
    """Refuses a folder with pickled weights only, in better words than transformers'."""
    folder = Path(place)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{place} holds no weights as safetensors; {ONLY_SAFETENSORS}")
