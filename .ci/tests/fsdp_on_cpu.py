"""`python -m prosody_ser.train` with FSDP2 over gloo. accelerate offers FSDP on accelerators only; nothing in it needs one."""
import os

os.environ |= dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_TRANSFORMER_CLS_TO_WRAP="WhisperEncoderLayer",
                   FSDP_RESHARD_AFTER_FORWARD="true", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT", FSDP_CPU_RAM_EFFICIENT_LOADING="false")   # examples/hpc/fsdp.yaml

from accelerate.state import AcceleratorState, DistributedType, PartialState

plain = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    """What it does for CUDA, MUSA, NPU ..."""
    fresh = not AcceleratorState._shared_state
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no": fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = with_fsdp

import sys

import torch

from prosody_ser import trainer
from prosody_ser.cli import main

if "--bf16" in sys.argv:                                     # as on a GPU that has it
    sys.argv.remove("--bf16")
    trainer.precision, trainer.half_precision = lambda *asked: dict(bf16=True), lambda: torch.bfloat16
main(["train", *sys.argv[1:]])
