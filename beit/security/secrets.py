"""Keeping secrets out of what is written: which keys and variables hold one, and what is shown."""

import contextlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from beit.errors import UserError

HIDDEN = "***"
_SECRET_KEY = re.compile(
    r"^(.*_)?(api_?key|access_?key|secret_?key|private_?key|secret|password|passwd|passphrase|"
    r"credentials?|bearer|(access|auth|api|hf|hub|wandb|refresh|session|bearer)_?token)$|"
    r"^(key|token|auth|authorization)$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"KEY|TOKEN(?!I[SZ])|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|COOKIE|BEARER|PRIVATE|WEBHOOK|"
    r"(^|_)(AUTH|DSN|PAT)(_|$)|_PWD$"
)
_URL_PASSWORD = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")  # https://name:password@host
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}\s]*)")
_LEAST = 8  # shorter values stand in too many words by chance

_seen: set[str] = set()  # variables that a config of this process refers to


def is_secret_key(key: str) -> bool:
    """Whether a value under this (dotted) key is a secret, by its last part: `x.api_key`."""
    return bool(_SECRET_KEY.match(re.split(r"[.@/]", key)[-1]))


def is_secret_variable(name: str) -> bool:
    """By its name, or because its value is an address with a password in it."""
    by_value = _URL_PASSWORD.search(os.environ.get(name, ""))
    return bool(_SECRET_VARIABLE.search(name.upper()) or by_value)


def check_secrets(content: Any) -> None:
    """Raises UserError for a secret that a config holds, or would hand to where it is written down.

    A secret is referred to, not typed: `api_key: ${oc.env:MY_API_KEY}`, and only where the key
    says that it is one. A value of a secret variable may stand nowhere. No message repeats it.
    """
    hidden = _secret_values()
    for key, text in _texts(content):
        for name in _ENVIRONMENT.findall(text):
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise UserError(f"{key}: ${{oc.env:...}} takes the plain name of a variable")
            _seen.add(name)
            if is_secret_variable(name) and not is_secret_key(key):
                raise UserError(
                    f"{key}: the variable {name} looks like a secret, which would be written down "
                    "with the config; the libraries that need it read it themselves"
                )
        referred = re.findall(r"[\w.]+", text) if "${" in text else []
        if not is_secret_key(key) and any(is_secret_key(n) for n in referred if "." in n):
            raise UserError(f"{key} refers to a key that holds a secret")
        if is_secret_key(key) and text and not text.startswith("${oc.env:"):
            raise UserError(
                f"{key} looks like a secret, which would be written down with the config: put it "
                f"into the environment and say {key}='${{oc.env:NAME}}'"
            )
        if _URL_PASSWORD.search(text):
            raise UserError(
                f"{key} is an address with a password, which would be written down with the config"
            )
        if any(value in text for value in hidden):
            raise UserError(
                f"{key} holds the value of a variable that looks like a secret: it would be "
                "written down with the config"
            )


def _texts(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield f"{key}.{name}".lstrip("."), str(name) if "${" in str(name) else ""
            yield from _texts(value, f"{key}.{name}".lstrip("."))
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _texts(value, key)
    elif isinstance(content, str):
        yield key, content
    elif is_secret_key(key) and content not in (None, False, True):
        yield key, str(content)  # a password of digits


def _secret_values() -> list[str]:
    names = (name for name in os.environ if is_secret_variable(name))
    values = [value for name in names if len(value := os.environ[name]) >= _LEAST]
    # the path of a file with the secret in it is none
    return [value for value in values if not os.path.exists(value)]


def redacted(text: str) -> str:
    """The text without values of the environment: `***` for secrets, else the variable's name."""
    for value in sorted(_secret_values(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for name in sorted(_seen, key=lambda name: -len(os.environ.get(name, ""))):
        value = os.environ.get(name, "")
        if len(value) >= 4:
            text = text.replace(value, f"${{oc.env:{name}}}")
    return _URL_PASSWORD.sub(HIDDEN, text)


def redact_tracebacks() -> None:
    """What Python prints of a fault of the program, also in a thread, is redacted too."""
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _print_redacted
        threading.excepthook = lambda told: _print_redacted(
            told.exc_type, told.exc_value or told.exc_type(), told.exc_traceback
        )


def _print_redacted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


def shown_words(words: Iterable[str]) -> list[str]:
    """The words of a command as they may be written down."""
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        secret = equals and is_secret_key(key.lstrip("-+~")) and not value.startswith("${oc.env:")
        found.append(redacted(f"{key}={HIDDEN}" if secret else word))
    return found


@contextlib.contextmanager
def environment_as_text() -> Iterator[None]:
    """Within it, `${oc.env:NAME}` resolves to its own text."""

    def text(*arguments: Any) -> str:
        return f"${{oc.env:{','.join(map(str, arguments))}}}"

    OmegaConf.register_new_resolver("oc.env", text, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def without_environment(node: Any) -> Any:
    """A resolved copy as plain data; within `environment_as_text`, without its values.

    What cannot be worked out from that text, the sides of an image say, stays as it was written.
    """
    if not OmegaConf.is_config(node):
        return node
    written: Any = OmegaConf.to_container(node, resolve=False)
    places = node.keys() if OmegaConf.is_dict(node) else range(len(node))
    found: dict[Any, Any] = {}
    for place in places:
        try:
            found[place] = without_environment(node[place])
        except (OmegaConfBaseException, UserError):
            found[place] = written[place]
    return found if OmegaConf.is_dict(node) else list(found.values())
