"""What the fork server of forked.py imports: everything that the programs need and whose import takes long.

All of it is frozen at the end, so that garbage collections in the forked processes pass it over. Each of theirs would
take some tenths of a second, and copy the memory that they share.
"""

# ruff: noqa: E402 - libraries are told to be quiet before they are imported

import gc

from configs.program.console import quiet_libraries

quiet_libraries()

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import hydra._internal.core_plugins.basic_launcher  # noqa: F401
import peft  # noqa: F401
import setuptools  # noqa: F401
import torch.utils.cpp_extension  # noqa: F401
import transformers.models.mixtral.modeling_mixtral  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import inference.generate
import inference.merging.merge  # noqa: F401
import train.run  # noqa: F401
from data.template import ChatTokenizer

from . import forked  # noqa: F401

ChatTokenizer.load()
get_checkpoint_conversion_mapping("mixtral")  # transformers makes those of all models at the first call, and keeps them
gc.collect()
gc.freeze()
