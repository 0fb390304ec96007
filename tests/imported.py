"""What tests/warm.py's server imports before it forks: nothing here computes, or asks the hub."""

import gc
import os

from tests.warm import CPU_ONLY

os.environ |= CPU_ONLY  # DeepSpeed and the hub's client look at these when they are imported

import datasets  # noqa: E402, F401
import deepspeed  # noqa: E402, F401
import peft  # noqa: E402, F401
import s3fs  # noqa: E402, F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import ditty.distributed.load  # noqa: E402
import ditty.distributed.zero  # noqa: E402, F401
import ditty.training.trainer  # noqa: E402
import ditty.worker  # noqa: E402, F401
import flows.mirror  # noqa: E402, F401

# What each process would otherwise do again: a thousand regular expressions, and garbage
# collection (DeepSpeed asks for it) over all that the imports made.
get_checkpoint_conversion_mapping("llama")
gc.freeze()
