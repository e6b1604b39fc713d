"""`tensorpeft`, where accelerate shards on CPUs too: torch's FSDP runs there, accelerate takes it for GPUs only.

    torchrun --nproc_per_node 2 tests/recipes/fsdp_on_cpu.py train RECIPE trainer.fsdp=true

Everything but the device is then what runs on GPUs: Trainer, accelerate's preparation, sharding, checkpoints.
"""

import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState

from tensorpeft_cli import main

plain_init = AcceleratorState.__init__


def init(self, mixed_precision=None, cpu=False, *args, fsdp_plugin=None, **kwargs):
    """What AcceleratorState does for every kind of device but the CPU."""
    plain_init(self, mixed_precision, cpu, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = init

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
