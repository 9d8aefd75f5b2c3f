"""What the fork server of forked.py imports: everything that the programs need and whose import takes long.

All of it is frozen at the end, so that garbage collections in the forked processes pass it over. Each of theirs would
take some tenths of a second, and copy the memory that they share.
"""

# ruff: noqa: E402 - libraries are told to be quiet before they are imported

import gc

from configs.program.console import quiet_libraries

quiet_libraries()

import deepspeed
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer
import peft  # noqa: F401
import setuptools  # noqa: F401
import torch.utils.cpp_extension  # noqa: F401
import transformers.models.mixtral.modeling_mixtral  # noqa: F401
from hydra.core.plugins import Plugins
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import inference.generate
import inference.merging.merge  # noqa: F401
import train.run  # noqa: F401
from data.template import ChatTokenizer

from . import forked  # noqa: F401

ChatTokenizer.load()
# What is made at the first call, and then kept: transformers' mappings of all models, Hydra's plugins, and which of
# DeepSpeed's operators can be compiled, which it asks a compiler.
get_checkpoint_conversion_mapping("mixtral")
Plugins.instance()
assert deepspeed.ops.__compatible_ops__
gc.collect()
gc.freeze()
