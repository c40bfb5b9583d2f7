"""Load model and tokenizer of a checkpoint in transformers' own format, a folder or a hub id.

transformers warns where it should stop: weights that are missing from a checkpoint are drawn at random and the model
talks nonsense. Here every such case is an error of one line. Code that a checkpoint brings along is never run: where
transformers has the family itself, it is used, and where it has not, the checkpoint is refused.
"""

from __future__ import annotations

import socket
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvatlas.core.errors import CapacityError, CheckpointError, UnsupportedError
from kvatlas.core.messages import told
from kvatlas.models.quiet import quiet

_TOKENIZER_FILES = ("*token*", "vocab*", "*.model")
_CONNECT_TIMEOUT_S = 3.0


def load_checkpoint(location: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return the model and the tokenizer of a checkpoint; no tokenizer if it has none.

    Args:
        location: a folder or a hub id.
        dtype: of weights; None for the checkpoint's own.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or corrupt.
        UnsupportedError: it needs code of its own.
        CapacityError: the weights do not fit into memory.
    """
    _check_size(Path(location))
    local = Path(location).exists() or not _hub_answers()
    place = {"local_files_only": local, "trust_remote_code": False}
    return _load_weights(location, dtype, place), _load_tokenizer(location, place)


def explain(error: Exception) -> str:
    """Return the first line of a loading error, and what to do about it where that is known."""
    text = str(error).strip()
    if type(error).__name__ == "SafetensorError":
        return f"a safetensors file is truncated or corrupt ({text}); download it again"
    if "ignore_mismatched_sizes" in text:
        return "weights have another shape than config.json says; download it again"
    if "Unrecognized configuration class" in text:
        return "it is not a causal language model of transformers"
    if "couldn't connect to" in text:
        return "it is not in the hub's cache on this machine and the hub cannot be reached; give a folder"
    return told(error)


def refusal(what: str, error: Exception) -> CheckpointError | UnsupportedError:
    """Return the error to raise where transformers could not load ``what``."""
    if "trust_remote_code" in str(error):
        return UnsupportedError(
            f"{what} needs code of its own, which kvatlas does not run; use a checkpoint of a family of transformers"
        )
    return CheckpointError(f"{what} cannot be loaded: {explain(error)}")


def _hub_answers() -> bool:
    """Return whether the hub can be reached; where it cannot, transformers would try for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    if endpoint.scheme in urllib.request.getproxies():
        return True  # known to the proxy only
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _check_size(folder: Path) -> None:
    """Refuse a configuration of a far larger model than the weights beside it: transformers would draw the rest.

    Raises:
        CheckpointError: the files cannot hold that many weights.
    """
    try:
        held = 0
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt"):  # a file that was cut off is another matter
                held += file.stat().st_size
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # whatever is wrong with it, the loading proper says it better
        return
    told = sum(weight.numel() for weight in model.parameters())
    if held and told > 8 * held:  # less than a bit for each
        raise CheckpointError(
            f"model {str(folder)!r}: config.json describes {told:,} weights, the files have {held:,} bytes; "
            "download it again"
        )


def _load_weights(location: str, dtype: torch.dtype | None, place: dict[str, Any]) -> PreTrainedModel:
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                location, dtype=dtype or "auto", output_loading_info=True, weights_only=True, **place
            )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CapacityError(f"the weights of {location!r} do not fit into memory: {error}") from error
    except Exception as error:  # transformers raises anything here, ZeroDivisionError included.
        raise refusal(f"model {location!r}", error) from error
    missing = sorted(str(key) for key in report["missing_keys"])
    mismatched = sorted(str(key[0]) for key in report["mismatched_keys"])
    if missing or mismatched:
        wrong = "missing" if missing else "of another shape than config.json says"
        keys = missing or mismatched
        raise CheckpointError(
            f"model {location!r}: {len(keys)} weights are {wrong}, first {keys[0]}; download it again"
        )
    loaded: PreTrainedModel = model
    return loaded


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Refuse a model with a weight that is no finite number: every logit may become NaN.

    Raises:
        CheckpointError: names the first such weight.
    """
    for key, weight in model.named_parameters():
        # A sum is one pass without a temporary; what is not finite stays so, and a mere overflow is looked at again.
        if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
            raise CheckpointError(f"model {name!r}: weight {key} holds NaN or infinity; download it again")


def _load_tokenizer(location: str, place: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    folder = Path(location)
    if folder.exists() and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        return None
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, **place)
            tokenizer("a", verbose=False)  # some settings are looked at only then
    except Exception as error:  # tokenizers raises bare Exception for a broken file.
        raise refusal(f"the tokenizer of {location!r}", error) from error
    return tokenizer
