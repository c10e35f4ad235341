"""A run from settings to adapter: reads, reports, trains, and writes what serves it."""

import shlex
import time
from contextlib import closing
from pathlib import Path

import jax
from rich.console import Console

from mixtral_jax.checkpoint.adapter import write_adapter
from mixtral_jax.checkpoint.pretrained import Pretrained, open_pretrained, save
from mixtral_jax.cli.train.facts import weights_digest
from mixtral_jax.cli.train.logs import Logs
from mixtral_jax.cli.train.output import (
    ADAPTER,
    CHECKPOINTS,
    MODEL,
    check_result,
    claimed,
    disk_errors,
    resumption,
)
from mixtral_jax.cli.train.report import Progressing, data_table, print_answers, program_table
from mixtral_jax.cli.train.stopping import Stopping
from mixtral_jax.compilation import keep_programs
from mixtral_jax.model.adapter import Adapter
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.tokenization.tokenizer import Tokenizer
from mixtral_jax.training.batch import Batch, PreferenceBatch
from mixtral_jax.training.dataset import Dataset
from mixtral_jax.training.loop import Trainer
from mixtral_jax.training.packing import PackedData, PairedData
from mixtral_jax.training.records import EndRecord
from mixtral_jax.training.run_settings import RunSettings
from mixtral_jax.training.samples import Samples
from mixtral_jax.training.step.flops import step_flops


def run(settings: RunSettings) -> int:
    """Trains as the settings say, or goes on with a run that was stopped. Raises UserError.

    Returns the exit status: 0, or 128 and the number of the signal that ended the run.
    """
    console = Console(soft_wrap=True)
    output = settings.output
    stopping = Stopping(lambda text: _tell(console, text), lambda: resumption(output))
    with stopping, disk_errors(output), claimed(output):
        return _run(settings, console, stopping)


def _tell(console: Console, text: str) -> None:
    console.show_cursor(True)  # which a bar hides
    console.print(text, markup=False, highlight=False)


def _run(settings: RunSettings, console: Console, stopping: Stopping) -> int:
    pretrained = open_pretrained(settings.model)
    tokenizer = pretrained.tokenizer
    data, validation = _read(settings, tokenizer)
    training = settings.training
    of_batches = PairedData if training.objective == "preference" else PackedData
    packed = of_batches(data.examples, training.length, training.rows, training.seed)
    config = training.resolved(packed.num_steps)
    assert config.steps is not None
    check_result(settings.output, result_folder(settings), config.steps)
    console.print(f"[bold]mixtral-jax train[/bold] {settings.model} -> {settings.output}")
    console.print(data_table(data.account, packed, config))
    for bad in data.account.bad_rows[:5]:
        console.print(f"left out: {bad.place} {bad.reason}", markup=False, highlight=False)
    keep_programs()
    model = pretrained.load(pretrained.placement(settings.dtype, settings.mesh))
    checks: list[Batch | PreferenceBatch] = []
    if validation is not None:
        rows = of_batches(validation.examples, training.length, training.rows, 0, is_shuffled=False)
        checks = [rows.batch(step) for step in range(rows.num_steps)]
    of_samples = (validation or data).examples[:: 2 if config.objective == "preference" else 1]
    samples = Samples(of_samples[: settings.samples], tokenizer)
    facts = {
        "data": data.digest(),
        "checkpoint": pretrained.card.name,
        "weights": weights_digest(model),
    }
    # Full fine-tuning has copies of the model, which is dropped; it answers before.
    before = samples.answers(model) if config.adapter is None else []
    began = time.perf_counter()
    trainer = Trainer(
        model,
        config,
        packed,
        folder=settings.output / CHECKPOINTS,
        facts=facts,
        validation=checks,
        samples=samples,
    )
    seconds = time.perf_counter() - began
    memory = trainer.program.memory
    console.print(program_table(trainer.trained, memory, model.config, seconds))
    base = None if config.adapter is None else model
    del model
    if trainer.resumed_from:
        console.print(f"goes on from step {trainer.resumed_from} of {trainer.num_steps}")
    if not _train(settings, trainer, console, stopping):
        return stopping.status
    if base is None:
        tuned = trainer.program.trainee.tuned(trainer.trained)
        _finish(settings, pretrained, trainer, tuned, console)
        after = samples.answers(tuned)
    else:
        _finish(settings, pretrained, trainer, None, console)
        before, after = samples.answers(base), samples.answers(base, trainer.adapter)
    for (asked, expected), base_text, tuned_text in zip(
        samples.texts(), before, after, strict=True
    ):
        print_answers(console, asked, expected, {"base": base_text, "tuned": tuned_text})
    _say_how_to_serve(settings, console)
    return 0


def _read(settings: RunSettings, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Returns the rows to train on, and those to validate on. Raises DataError."""
    read = [
        Dataset.read(
            sources,
            tokenizer,
            settings.training.length,
            bad_rows=settings.bad_rows,
            long_rows=settings.long_rows,
            ignored_keys=settings.ignored_keys,
            has_pairs=settings.training.objective == "preference",
        )
        for sources in (settings.data, settings.validation)
        if sources
    ]
    return read[0], read[1] if len(read) > 1 else None


def _train(settings: RunSettings, trainer: Trainer, console: Console, stopping: Stopping) -> bool:
    """Runs the steps; returns whether all of them are done."""
    logs = Logs(settings.output, trainer.step)
    flops = step_flops(trainer.program.trainee.config, trainer.config)
    shown = Progressing(console, trainer.config, trainer.step, flops)
    is_finished = False
    try:
        with stopping.finishing(trainer.stop), shown, closing(trainer.records()) as records:
            for record in records:
                shown.show(record)
                logs.write(record)
                if isinstance(record, EndRecord):
                    is_finished = record.is_finished
        if not is_finished:
            console.print(
                f"stopped after step {trainer.step} of {trainer.num_steps}, which is saved in "
                f"{settings.output / CHECKPOINTS}: run the same command to go on"
            )
    finally:
        logs.close()
    return is_finished


def _finish(
    settings: RunSettings,
    pretrained: Pretrained,
    trainer: Trainer,
    tuned: Transformer | None,
    console: Console,
) -> None:
    """Writes the adapter, or the whole model, unless an earlier run of the command has done it."""
    folder = result_folder(settings)
    if folder.exists():
        console.print(f"{folder} is there already, of an earlier end of this run")
    elif tuned is None:
        adapter = settings.training.adapter
        assert adapter is not None
        base = settings.base or pretrained.card.name
        assert isinstance(trainer.trained, Adapter)
        whole = trainer.program.trainee.whole(trainer.trained)
        write_adapter(folder, jax.device_get(whole), adapter, base)
    else:
        save(tuned, pretrained.tokenizer, folder, name=f"{pretrained.card.name}-tuned")


def result_folder(settings: RunSettings) -> Path:
    """Returns the folder of what a run makes."""
    return settings.output / (MODEL if settings.training.adapter is None else ADAPTER)


def _say_how_to_serve(settings: RunSettings, console: Console) -> None:
    folder = result_folder(settings)
    console.print(f"curves and logs: {settings.output}")
    base = shlex.quote(settings.model)
    if settings.training.adapter is None:
        console.print(f"serve it: mixtral-jax serve --model {shlex.quote(str(folder))}")
        return
    name = settings.output.name
    console.print(f"the adapter is in {folder}")
    console.print(
        f"serve it: mixtral-jax serve --model {base} --adapter {shlex.quote(f'{name}={folder}')}"
    )
