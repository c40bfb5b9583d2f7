"""Silence what transformers prints while a model is loaded or probed: our own errors say what matters.

One thread at a time: verbosity, warnings' filters, and what transformers patches while it makes a model (its
initialisers, the tying of weights, torch's default dtype) belong to the process. Two threads that change and restore
them by turns leave the inner one's values behind, and every later model comes out without its tied weights.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging

_ONE_AT_A_TIME = threading.RLock()  # a thread that loads may probe meanwhile


@contextmanager
def quiet() -> Iterator[None]:
    """Mute the logs of transformers and the hub, progress bars and Python warnings while the block runs.

    Restores all of them. A second thread waits until the first has left.
    """
    with _ONE_AT_A_TIME:
        verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
        bars = logging.is_progress_bar_enabled()
        logging.set_verbosity(logging.CRITICAL)
        hub_logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.set_verbosity(verbosity)
            hub_logging.set_verbosity(hub_verbosity)
            if bars:
                logging.enable_progress_bar()
