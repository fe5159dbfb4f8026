"""What a GPU would be given, on a machine that has none."""

from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

_H100 = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="cuda")


def lowered_for_gpu(run, *arrays) -> str:
    """The text of a jitted function's program, before XLA compiles it."""
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=_H100)):
        return run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
