"""The training step, compiled for chips that need not be here: its bytes a chip, and its work.

A step is one program that grows with the layers, and so does the time that compiling it takes:
minutes for 32 layers. Its layers are equal, so the step is compiled with few of them twice, and
what a layer adds is the difference. Where it is likely to end in time the whole step is compiled as
well, and its figures are taken; the plan says which of the two it was.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import jax

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import ConfigError
from mixtral_jax.model.transformer import Transformer, held_bytes
from mixtral_jax.placement import Placement, WeightDtypes
from mixtral_jax.planning.compiler_process import Fields, Progress, answer_job, report_of
from mixtral_jax.planning.topology import target_devices
from mixtral_jax.roofline.chips import Topology, topologies
from mixtral_jax.sharding import mesh_sizes
from mixtral_jax.training.config import TrainingConfig
from mixtral_jax.training.step.flops import step_flops
from mixtral_jax.training.step.program import TrainingMemory, TrainingProgram, bytes_on_device

# Layers of the two steps that show what a layer adds.
_FEW = (2, 4)
# Seconds within which the whole step must be likely to be compiled.
_TIME_LIMIT = 240.0
# The compiler tries less to make the program fast, which takes it a third of the time. Arrays take
# the same room as in a program that is made to run, to a few parts in a hundred, and the program
# itself less.
_OPTIONS = {"exec_time_optimization_effort": -1.0}


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One training step to compile.

    Attributes:
        model: sizes of the model.
        dtype: float32, bfloat16, int8 or fp8; the dtype of its weights.
        topology: the chips' name, such as tpu:v5e:2x4.
        mesh: as `train --mesh` takes it, such as data=8,expert=1,tensor=1, or auto.
        training: the settings, in which `steps` is known.
        whole: True compiles the whole step however long it takes, False never does, and None does
            where it is likely to end in minutes.
        weight_dtypes: of single weights, as in `Placement.of`.
    """

    model: ModelConfig
    dtype: str
    topology: str
    mesh: str
    training: TrainingConfig
    whole: bool | None = None
    weight_dtypes: WeightDtypes = ()

    def to_json(self) -> Fields:
        """The fields as plain values."""
        return asdict(self) | {"training": self.training.to_json()}

    @classmethod
    def from_json(cls, fields: Fields) -> "TrainingJob":
        """The job that `to_json` made these fields of."""
        made = {
            "model": ModelConfig.from_json(fields["model"]),
            "training": TrainingConfig.from_json(fields["training"]),
            "weight_dtypes": tuple(map(tuple, fields["weight_dtypes"])),
        }
        return cls(**{**fields, **made})


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The bytes and operations that one more layer adds to a step, on one device.

    Attributes:
        temporary_bytes: to the largest amount of temporaries.
        residual_bytes: of these, the layer's input, which the backward pass needs.
        gradient_bytes: of these, the gradient of its trained arrays, which the norm of the whole
            gradient needs at once; twice with micro-batches, whose gradients are summed up.
        operations: operations of one micro-batch as the compiler counts them, loops once; None
            where it does not count.
    """

    temporary_bytes: int
    residual_bytes: int
    gradient_bytes: int
    operations: float | None


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The bytes that a training step takes on each chip of a topology, and its work.

    Attributes:
        topology: the chips' name.
        mesh: the split of the model over them.
        method: how the bytes came about, in words.
        memory: bytes on one chip.
        chip_bytes: bytes that programs can use there.
        layer: what a layer adds; None for a model of one layer.
        step_flops: operations of the model in a step over all chips, by arithmetic, without what
            is computed again.
        seconds: that compiling took.
    """

    topology: str
    mesh: str
    method: str
    memory: TrainingMemory
    chip_bytes: int
    layer: LayerCost | None
    step_flops: float
    seconds: float

    @property
    def fits(self) -> bool:
        """Says whether the step fits a chip."""
        return self.memory.total_bytes <= self.chip_bytes

    def to_json(self) -> Fields:
        """The fields and whether they fit as plain values."""
        return {"fits": self.fits, **asdict(self)}

    @classmethod
    def from_json(cls, fields: Fields) -> "TrainingPlan":
        """The plan that `to_json` made these fields of."""
        made: Fields = {"memory": TrainingMemory(**fields["memory"])}
        if fields["layer"] is not None:
            made["layer"] = LayerCost(**fields["layer"])
        return cls(**{name: v for name, v in {**fields, **made}.items() if name != "fits"})


def plan_training(job: TrainingJob, progress: Progress = lambda line: None) -> TrainingPlan:
    """Compiles the job's step in a process that has the topology's devices.

    Raises ConfigError where the mesh is not one of so many chips, and CompileError with the message
    of the compiler or of the settings.
    """
    (topology,) = _one(job.topology)
    if job.mesh != "auto":
        data, expert, tensor = mesh_sizes(job.mesh)
        if data * expert * tensor != topology.chips:
            raise ConfigError(
                f"--mesh {job.mesh} is for {data * expert * tensor} devices, and {topology} has "
                f"{topology.chips}; the sizes must multiply to that, or give --mesh auto"
            )
    fields = report_of("mixtral_jax.planning.training_plan", job.to_json(), topology, progress)
    return TrainingPlan.from_json(fields)


def compile_training(
    job: TrainingJob, devices: Sequence[jax.Device], progress: Progress = lambda line: None
) -> TrainingPlan:
    """Compiles the job's step for these devices, whose jax must be this process's."""
    (topology,) = topologies(job.topology)
    began = time.monotonic()
    layers = job.model.num_layers
    few = sorted({min(layers, count) for count in _FEW})
    steps = []
    for count in few:
        progress(f"compiling {count} layers")
        steps.append(_Step.compiled(job, count, devices))
    first, last = steps[0], steps[-1]
    memory = _extrapolated(first, last, layers)
    if job.weight_dtypes and job.training.adapter is not None:
        # Layers are not equal then: the parameters are counted.
        memory = replace(memory, frozen_bytes=held_bytes(_model(job, layers, devices)))
    method = "compiled"
    if layers > last.layers:
        method = f"compiled with {few[0]} and {few[1]} of {layers} layers, and extrapolated"
        seconds = _line(first.layers, first.seconds, last.layers, last.seconds, layers)
        fits = memory.total_bytes <= topology.chip.memory
        is_short = fits and seconds <= _TIME_LIMIT
        if job.whole or (job.whole is None and is_short):
            progress(f"compiling all {layers} layers, which takes about {seconds:.0f} s")
            last = _Step.compiled(job, layers, devices)
            memory, method = last.memory, "compiled"
    return TrainingPlan(
        topology=str(topology),
        mesh=_placement(job, devices).mesh_text or "one device",
        method=method,
        memory=memory,
        chip_bytes=topology.chip.memory,
        layer=None if first is last else _layer_cost(job, devices, first, last),
        step_flops=step_flops(job.model, job.training),
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, kw_only=True)
class _Step:
    """The figures of a compiled step of so many layers."""

    layers: int
    memory: TrainingMemory
    trained_bytes: int
    operations: float | None
    seconds: float

    @classmethod
    def compiled(cls, job: TrainingJob, layers: int, devices: Sequence[jax.Device]) -> "_Step":
        began = time.monotonic()
        model = _model(job, layers, devices)
        program = TrainingProgram(model, job.training, _OPTIONS)
        return cls(
            layers=layers,
            memory=program.memory,
            trained_bytes=bytes_on_device(program.trainee.abstract()),
            operations=program.cost_of_one_pass,
            seconds=time.monotonic() - began,
        )


def _one(name: str) -> list[Topology]:
    sizes = topologies(name)
    if len(sizes) != 1:
        raise ConfigError(
            f"--topology {name} names several sizes; give one, such as {name}:{sizes[0].slice}"
        )
    return sizes


def _placement(job: TrainingJob, devices: Sequence[jax.Device]) -> Placement:
    mesh = "data=1,expert=1,tensor=1" if job.mesh == "auto" and len(devices) == 1 else job.mesh
    return Placement.of(job.model, job.dtype, mesh, False, devices, job.weight_dtypes)


def _model(job: TrainingJob, layers: int, devices: Sequence[jax.Device]) -> Transformer:
    config = replace(job.model, num_layers=layers)
    return Transformer(config, _placement(job, devices), rngs=None)


def _line(x0: int, y0: float, x1: int, y1: float, x: int) -> float:
    """The value at x of the line through two points; of one point, its value."""
    return y1 if x0 == x1 else y1 + (y1 - y0) / (x1 - x0) * (x - x1)


def _extrapolated(first: _Step, last: _Step, layers: int) -> TrainingMemory:
    few, more = asdict(first.memory), asdict(last.memory)
    return TrainingMemory(
        **{
            name: round(
                _line(first.layers, float(few[name]), last.layers, float(more[name]), layers)
            )
            for name in few
        }
    )


def _layer_cost(
    job: TrainingJob, devices: Sequence[jax.Device], first: _Step, last: _Step
) -> LayerCost:
    added = last.layers - first.layers
    config = job.training
    placement = _placement(job, devices)
    rows = config.rows // config.micro_batches // placement.num_sequence_groups
    rows *= 2 if config.objective == "preference" else 1
    size = rows * config.length * job.model.hidden_size
    counted = None
    if first.operations is not None and last.operations is not None:
        counted = (last.operations - first.operations) / added
    sums = 1 if config.micro_batches == 1 else 2
    return LayerCost(
        temporary_bytes=(last.memory.temporary_bytes - first.memory.temporary_bytes) // added,
        residual_bytes=size * jax.numpy.dtype(placement.activation_dtype).itemsize,
        gradient_bytes=sums * (last.trained_bytes - first.trained_bytes) // added,
        operations=counted,
    )


def _compiled(fields: Fields, progress: Progress) -> Fields:
    job = TrainingJob.from_json(fields)
    (topology,) = topologies(job.topology)
    return compile_training(job, target_devices(topology), progress).to_json()


if __name__ == "__main__":
    answer_job(_compiled)
