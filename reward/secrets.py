"""Settings as they may be written down: into a run's folder, to a tracker, onto the terminal."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

SECRET = re.compile(
    r"(^|_)(password|passwd|passphrase|secrets?|credentials?|apikey|(api|access|private)_key)(_|$)"
    # At the end only: `max_new_tokens` counts, and `pad_token_id` is a number of the vocabulary.
    r"|(^|(?<!_per)_)token(_value)?$"
)
NO_SECRETS = {*PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES, "decoder_start_token", "stop_token", "per_token"}
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds something that opens a door."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|[-.]", "_", name).lower()
    return name not in NO_SECRETS and SECRET.search(name) is not None


def without_secrets(value: Any) -> Any:
    """A copy of nested settings with `<NAME>` in place of every secret, and of logins in addresses."""
    if isinstance(value, dict):
        return {
            name: f"<{name.upper()}>" if _hides(name, part) else without_secrets(part) for name, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(part) for part in value]
    return URL_LOGIN.sub("<LOGIN>", value) if isinstance(value, str) else value


def _hides(name: Any, value: Any) -> bool:
    # None and `use_auth_token: true` say where a secret comes from, not what it is.
    return isinstance(name, str) and value is not None and not isinstance(value, bool) and is_secret(name)


class WithoutSecrets:
    """Settings of transformers that show no secret; mixed in before `TrainingArguments`.

    transformers masks names that end in `_token` at the top level: `hub_token`, but not the `token` among the
    arguments of `from_pretrained`, and `pad_token`, which is no secret. Trackers read `to_dict` too.
    """

    def to_dict(self) -> dict[str, Any]:
        """As in transformers. Nothing reads the file again: a resumed run takes its settings from its caller."""
        shown = super().to_dict()
        # What transformers has masked already is looked at again, by our rule.
        shown |= {name: getattr(self, name) for name in shown if name.endswith("_token")}
        return without_secrets(shown)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"

    __repr__ = __str__
