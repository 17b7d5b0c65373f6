"""Train a model with memory, from one YAML file.

    accelerate launch train/run.py --config configs/train/demo_passkey.yaml optimizer.learning_rate=1e-3
    accelerate launch train/run.py --config configs/train/demo_passkey.yaml --resume

Several processes on a CPU: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train/run.py ... num_processes=2

`output_dir` gets final/ (the trained model), checkpoints/, log.jsonl (the same bit for bit after any number of
kills and resumes), timing.jsonl, curve.png and what the trackers write; start/ is the base of a run that began from
random weights, as it was then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":  # as a script: no room of ours at the top of the import path, `memlayers` on it
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    if importlib.util.find_spec("memlayers") is None:
        sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed, tqdm

from memlayers.core.model import memories
from memlayers.optim import clip_gradients
from memlayers.train.background import Background
from memlayers.train.config import TrainConfig
from memlayers.train.curriculum import Curriculum
from memlayers.train.data import loss_weights
from memlayers.train.log import Log, draw_curve
from memlayers.train.model import build_model, check_regime, save_model, segment_length
from memlayers.train.objective import Objective
from memlayers.train.optimizers import make_optimizers, make_schedule, row_sparse_tables
from memlayers.train.resume import Progress, load_checkpoint, save_checkpoint, saved_usage
from memlayers.train.row_sparse_gradients import average_row_sparse, prepare_objective
from memlayers.train.sources import make_source
from memlayers.train.sparse_finetuning import SparseFinetuning
from memlayers.train.start import check_embeddings, keep_start, prepare_output, start_accelerator
from memlayers.train.usage import UsageLog
from memlayers.yaml_config import load_yaml


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what happened and what to do."""


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Run the training that `config` describes.

    Args:
        config: all of it, see `TrainConfig`.
        resume: go on from the newest complete checkpoint in `output_dir`, or start where there is none.

    Returns:
        The folder of the trained model, `output_dir/final`.

    Raises:
        ConfigError: a field that does not fit the model, the data or the number of processes.
        FileExistsError: `output_dir` has checkpoints and neither `resume` nor `overwrite` is set.
        TrainingError: the loss is not finite.
    """
    output = Path(config.output_dir)
    accelerator = start_accelerator(config, output)
    say, log, timing, usage, selection = accelerator.print, None, None, None, None
    try:
        checkpoint = prepare_output(config, resume, accelerator)

        # The model, what learns, the data.
        set_seed(config.seed)
        model, tokenizer = build_model(config)
        source = make_source(config, tokenizer, segment_length(model))
        check_regime(model, source.regime, config.loss)
        check_embeddings(model, source)
        if config.model.config is not None:
            keep_start(model, tokenizer, output / "start", accelerator)
        weights = loss_weights(config.loss, source.has_accuracy)
        model.to(accelerator.device)
        background = Background(model, config, tokenizer) if config.background is not None else None
        objective = Objective(model, weights, source.by_item, background, config.loss.cycle)
        tables = row_sparse_tables(model, config.optimizer)
        optimizers = make_optimizers(model, config, tables)
        objective = prepare_objective(accelerator, objective, tables.values())
        prepared = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
        schedules = [make_schedule(optimizer, config) for optimizer in optimizers]
        if config.sparse_finetuning is not None:
            selection = SparseFinetuning(model, config, tokenizer, tables, accelerator.device)
        usage = UsageLog(model)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        set_seed(config.seed + accelerator.process_index)  # dropout differs between processes

        # Where the run stands.
        progress = Progress()
        if checkpoint is not None:
            progress = load_checkpoint(
                checkpoint, model, optimizers, schedules, rank=accelerator.process_index
            )
            usage.restore(saved_usage(checkpoint, accelerator.process_index))
            say(f"resuming from {checkpoint} at step {progress.step}")
        elif resume:
            say(f"no complete checkpoint in {output / 'checkpoints'}: starting from step 0")
        curriculum = Curriculum(config, progress)
        if accelerator.is_main_process:
            log = Log(output / "log.jsonl", progress.log_offset)
            timing = (output / "timing.jsonl").open("a" if checkpoint else "w")
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
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {progress.step + 1}: loss {loss}, gradient norm {norm}; training stopped before this step "
                    "changed the weights. Lower optimizer.learning_rate, set clip, or add schedule.warmup_steps; "
                    f"the checkpoints in {output / 'checkpoints'} are as they were."
                )
            rate = optimizers[0].param_groups[0]["lr"]
            for optimizer, schedule in zip(prepared, schedules):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
            for memory in memories(model).values():
                memory.after_step()
            progress.step += 1
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
                if accelerator.is_main_process:
                    log.write(line)
                    record = {
                        "step": progress.step,
                        "seconds": round(spent, 4),
                        "tokens_per_second": round(read / spent),
                    }
                    timing.write(json.dumps(record) + "\n")
                    timing.flush()
                shown = {"loss": f"{line['loss']:.3f}", "acc": f"{line['accuracy']:.2f}"}
                bar.set_postfix({**shown, "segments": line["stage_segments"]}, refresh=False)
            bar.update()
            if done or (config.checkpoint_every and progress.step % config.checkpoint_every == 0):
                progress.log_offset = log.sync() if log else 0
                save_checkpoint(
                    output / "checkpoints",
                    progress,
                    model,
                    optimizers,
                    schedules,
                    config=config.model_dump(mode="json"),
                    keep=config.keep_checkpoints,
                    usage=usage.tensors(),
                    rank=accelerator.process_index,
                    barrier=accelerator.wait_for_everyone,
                )
        bar.close()

        # The trained model and the picture.
        final = output / "final"
        if accelerator.is_main_process:
            if final.exists():
                shutil.rmtree(final)
            save_model(model, tokenizer, config, final)
            draw_curve(output / "log.jsonl", output / "curve.png")
            usage.draw(output / "usage.png")
        accelerator.wait_for_everyone()
        say(f"trained to step {progress.step}; the model is in {final}")
        return final
    finally:
        for part in filter(None, (log, timing, usage, selection)):
            part.close()
        accelerator.end_training()
        AcceleratorState._reset_state()  # so that another run in this process may choose another precision
        GradientState._reset_state()


def log_line(progress: Progress, rate: float, segments: int | None) -> dict:
    """Means since the last line. No times here: the log of a resumed run is the same bit for bit."""
    loss, accuracy, norm = (sum(column) / len(column) for column in zip(*progress.unlogged))
    return {
        "step": progress.step,
        "loss": loss,
        "accuracy": accuracy,
        "gradient_norm": norm,
        "learning_rate": rate,
        "stage_segments": segments,
        "tokens": progress.tokens,
    }


def main() -> int:
    """Command line; errors are one paragraph unless --debug."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, help="YAML file with the fields of memlayers.train.config.TrainConfig"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, laid over the file")
    arguments = parser.parse_intermixed_args()
    try:
        train(load_yaml(arguments.config, arguments.overrides, TrainConfig), resume=arguments.resume)
    except (ValueError, TypeError, OSError, NotImplementedError, TrainingError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
