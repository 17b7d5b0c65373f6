"""Train a model with memory, from one YAML file.

    accelerate launch train/run.py --config configs/train/demo_passkey.yaml optimizer.learning_rate=1e-3
    accelerate launch train/run.py --config configs/train/demo_passkey.yaml --resume

Several processes on a CPU: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train/run.py ... num_processes=2

`output_dir` gets final/ (the trained model), checkpoints/, log.jsonl (the same bit for bit after any number of
kills and resumes), timing.jsonl, curve.png and what the trackers write; start/ is the base of a run that began from
random weights, as it was then. It is touched after everything else was found right, and nothing is replaced or
removed there that a run of memlayers train has not written.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # as a script: no room of ours at the top of the import path, `memlayers` on it
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    if importlib.util.find_spec("memlayers") is None:
        sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed, tqdm

from memlayers.config import ConfigError
from memlayers.core.model import memories
from memlayers.errors import paragraph
from memlayers.optim import clip_gradients
from memlayers.train.background import Background
from memlayers.train.checkpoints import write_checkpoint
from memlayers.train.config import TrainConfig
from memlayers.train.curriculum import Curriculum
from memlayers.train.data import loss_weights
from memlayers.train.finite import FiniteCheck
from memlayers.train.log import CURVE, LOG, USAGE, Logs, draw_curve, log_line
from memlayers.train.model import build_model, check_regime, save_model, segment_length
from memlayers.train.objective import Objective
from memlayers.train.optimizers import make_optimizers, make_schedule, row_sparse_tables
from memlayers.train.output import FINAL, START, Output
from memlayers.train.processes import TrainingError, all_or_none, let_go, on_main
from memlayers.train.row_sparse_gradients import average_row_sparse, prepare_objective
from memlayers.train.snapshot import Parts, Progress, put_back, write_own, write_shared
from memlayers.train.sources import make_source
from memlayers.train.sparse_finetuning import SparseFinetuning
from memlayers.train.start import check_embeddings, flat, start_accelerator, take_output, write_start
from memlayers.train.usage import UsageLog
from memlayers.yaml_config import load_yaml


def train(config: TrainConfig, resume: bool = False, verify: bool = True) -> Path:
    """Run the training that `config` describes.

    Args:
        config: all of it, see `TrainConfig`.
        resume: go on from the newest whole checkpoint in `output_dir`, or start where there never was one.
        verify: on resume, compare all files with their checksums; False takes the newest checkpoint as it is.

    Returns:
        The folder of the trained model, `output_dir/final`.

    Raises:
        ConfigError: a field that does not fit the model, the data or the number of processes.
        FileExistsError: `output_dir` has an earlier run and neither `resume` nor `overwrite` is set, or something in it
            is not ours; names it.
        FolderInUse: another run writes to `output_dir`.
        DamagedFile: on resume no checkpoint is whole, or the log is not; names the file.
        TrainingError: loss, weights or moments are not finite, or another process failed.
        OSError: the disk is full, say; names what was being written.
    """
    output = Output(Path(config.output_dir), resume, config.overwrite, verify)
    accelerator = start_accelerator(config, output.folder)
    say = accelerator.print
    with ExitStack() as stack:
        stack.callback(end, accelerator)
        on_main(accelerator, output.look)  # and again when all else was found right; this spares the wait

        # The model, what learns, the data.
        set_seed(config.seed)
        model, tokenizer = build_model(config)
        source = make_source(config, tokenizer, segment_length(model))
        check_regime(model, source.regime, config.loss)
        check_embeddings(model, source)
        weights = loss_weights(config.loss, source.has_accuracy)
        model.to(accelerator.device)
        background = Background(model, config, tokenizer) if config.background is not None else None
        objective = Objective(model, weights, source.by_item, background, config.loss.cycle)
        tables = row_sparse_tables(model, config.optimizer)
        optimizers = make_optimizers(model, config, tables)
        objective = prepare_objective(accelerator, objective, tables.values())
        stack.callback(let_go, objective)
        prepared = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
        schedules = [make_schedule(optimizer, config) for optimizer in optimizers]
        selection = None
        if config.sparse_finetuning is not None:
            selection = SparseFinetuning(model, config, tokenizer, tables, accelerator.device)
            stack.callback(selection.close)
        usage = UsageLog(model)
        stack.callback(usage.close)
        parts, finite = Parts(model, optimizers, schedules), FiniteCheck(model, tables, output.checkpoints)
        learning = list(finite.learning.values())

        # Where the run stands; from here on `output_dir` is written to.
        on_main(accelerator, lambda: stack.enter_context(output.hold()))
        from_config = config.model.config is not None
        start = (lambda folder: write_start(model, tokenizer, folder)) if from_config else None
        checkpoint = on_main(accelerator, lambda: take_output(output, config, accelerator, start))
        if from_config:
            model.config._name_or_path = f"../{START}"  # as it lies beside final/
        if config.trackers:
            accelerator.init_trackers("memlayers", config=flat(config.model_dump(mode="json")))
        set_seed(config.seed + accelerator.process_index)  # dropout differs between processes
        progress = Progress()
        if checkpoint is not None:
            rank = accelerator.process_index
            progress, kept = all_or_none(accelerator, lambda: put_back(checkpoint, parts, rank, verify))
            usage.restore(kept)
            say(f"resuming from {checkpoint} at step {progress.step}")
        elif resume:
            say(f"no checkpoint in {output.checkpoints}: starting from step 0")
        curriculum = Curriculum(config, progress)
        logs = Logs(output.folder) if accelerator.is_main_process else None
        all_or_none(accelerator, logs and partial(stack.enter_context, logs.opened(progress, verify)))
        n_learning = sum(parameter.numel() for parameter in learning)
        say(f"{n_learning:,} of {sum(p.numel() for p in model.parameters()):,} parameters learn")

        refresh = 1.0 if sys.stderr.isatty() else 20.0  # seconds; a log file is not filled with bars
        bar = tqdm(total=config.max_steps, initial=progress.step, desc="train", mininterval=refresh)
        last_time, last_tokens = time.perf_counter(), progress.tokens
        done = progress.step >= config.max_steps or curriculum.reached(config.stop_at)
        while not done:
            # Forward and backward, `gradient_accumulation` times.
            segments = curriculum.draw(progress.step)
            losses, accuracies = [], []
            for micro in range(config.gradient_accumulation):
                position = progress.step * config.gradient_accumulation + micro
                batch = source.batch(position, accelerator.process_index, accelerator.num_processes, segments)
                batch, old = batch.to(accelerator.device), None
                if background is not None:
                    place = position, accelerator.process_index, accelerator.num_processes
                    old = background.batch(*place).to(accelerator.device)
                    progress.tokens += old.n_tokens * accelerator.num_processes
                last = micro == config.gradient_accumulation - 1
                with nullcontext() if last else accelerator.no_sync(objective):
                    loss, accuracy = objective(batch, old)
                    accelerator.backward(loss)
                losses.append(loss.detach())
                accuracies.append(accuracy)
                progress.tokens += batch.n_tokens * accelerator.num_processes
            average_row_sparse(accelerator, tables.values())
            if selection is not None:
                selection.keep_top_slots(accelerator)
            norm = clip_gradients(learning, config.clip)

            # One look at the numbers, before the step is taken.
            measured = torch.stack(
                [torch.stack(losses).mean(), torch.stack(accuracies).mean().to(loss.dtype)]
            )
            loss, accuracy = accelerator.reduce(measured, reduction="mean").tolist()
            norm = norm.item()
            finite.check_loss(progress.step + 1, loss, norm)
            rate = optimizers[0].param_groups[0]["lr"]
            for optimizer, schedule in zip(prepared, schedules):
                optimizer.step()
                schedule.step()
            for memory in memories(model).values():
                memory.after_step()
            progress.step += 1
            finite.check_step(progress.step)
            for optimizer in prepared:
                optimizer.zero_grad(set_to_none=True)
            progress.unlogged.append([loss, accuracy, norm])

            # Curriculum, log, checkpoint.
            shown = curriculum.stage_segments
            curriculum.update(segments, accuracy)
            done = progress.step >= config.max_steps or curriculum.reached(config.stop_at)
            if progress.step % config.log_every == 0 or done:
                line = {**log_line(progress, rate, segments=shown), **usage.figures()}
                progress.unlogged.clear()
                now = time.perf_counter()
                spent, read = now - last_time, progress.tokens - last_tokens
                last_time, last_tokens = now, progress.tokens
                accelerator.log(
                    {k: v for k, v in line.items() if k != "step" and v is not None}, step=progress.step
                )
                record = {
                    "step": progress.step,
                    "seconds": round(spent, 4),
                    "tokens_per_second": round(read / spent),
                }
                all_or_none(accelerator, logs and partial(logs.write, line, record))
                shown = {"loss": f"{line['loss']:.3f}", "acc": f"{line['accuracy']:.2f}"}
                bar.set_postfix({**shown, "segments": line["stage_segments"]}, refresh=False)
            bar.update()
            if done or (config.checkpoint_every and progress.step % config.checkpoint_every == 0):
                finite.check_all(progress.step, optimizers)
                place = all_or_none(accelerator, logs and logs.sync)
                progress.log_offset, progress.log_checksum = place or (0, None)
                write_checkpoint(
                    accelerator,
                    output.checkpoints,
                    progress.step,
                    config.keep_checkpoints,
                    own=lambda folder: write_own(folder, usage.tensors(), accelerator.process_index),
                    shared=lambda folder: write_shared(
                        folder, parts, progress, config.model_dump(mode="json")
                    ),
                )
        bar.close()

        # The trained model and the pictures, in one step.
        finite.check_all(progress.step, optimizers)

        def fill(folder: Path) -> None:
            save_model(model, tokenizer, config, folder / FINAL)
            draw_curve(output.folder / LOG, folder / CURVE)
            usage.draw(folder / USAGE)

        on_main(accelerator, lambda: output.put(fill, replaces=FINAL))
        say(f"trained to step {progress.step}; the model is in {output.final}")
        return output.final


def end(accelerator: Accelerator) -> None:
    """Close the trackers, and leave no state by which another run in this process could not choose another precision."""
    accelerator.end_training()
    AcceleratorState._reset_state()
    GradientState._reset_state()


def main() -> int:
    """Command line; errors are one paragraph unless --debug."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, help="YAML file with the fields of memlayers.train.config.TrainConfig"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="on --resume, take the newest checkpoint without its checksums",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, laid over the file")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_yaml(arguments.config, arguments.overrides, TrainConfig)
        train(config, resume=arguments.resume, verify=not arguments.no_verify)
    except Exception as error:
        if arguments.debug:
            raise
        if not is_told_by_another(error):
            print(f"error: {paragraph(error)}", file=sys.stderr)
        return 1
    return 0


def is_told_by_another(error: Exception) -> bool:
    """Whether the main process prints this error of another one: what all of them find, and what it was told."""
    return os.environ.get("RANK", "0") != "0" and isinstance(error, (ConfigError, TrainingError))


if __name__ == "__main__":
    sys.exit(main())
