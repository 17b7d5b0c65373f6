"""How many segments the items of a step have, raised when accuracy allows it."""

from __future__ import annotations

import random

from .config import TaskData, TrainConfig
from .snapshot import Progress


class Curriculum:
    """Draws the number of segments of each step and moves the stage; its state is in `Progress`.

    Without a `curriculum` section there is one stage, the data's own number of segments; data without segments
    has none at all.
    """

    def __init__(self, config: TrainConfig, progress: Progress):
        self.section, self.progress, self.seed = config.curriculum, progress, config.seed
        if self.section is not None:
            self.stages, self.window = self.section.stages, self.section.window
        else:
            self.stages = [config.data.segments] if isinstance(config.data, TaskData) else []
            self.window = 20
        if progress.stage >= max(1, len(self.stages)):
            raise ValueError(
                f"curriculum.segments: the checkpoint is at stage {progress.stage}, beyond the last one"
            )

    @property
    def stage_segments(self) -> int | None:
        """Segments at the current stage."""
        return self.stages[self.progress.stage] if self.stages else None

    def draw(self, step: int) -> int | None:
        """Number of segments of the items of `step`, the same on every process."""
        if self.section is None or not self.section.varied or self.progress.stage == 0:
            return self.stage_segments
        rng = random.Random(f"memlayers:segments:{self.seed}:{step}")
        if rng.random() < self.section.current_share:
            return self.stage_segments
        return rng.choice(self.stages[: self.progress.stage])

    def update(self, segments: int | None, accuracy: float) -> None:
        """Take note of a step; open the next stage when the current one is mastered."""
        if segments is None or segments != self.stage_segments:
            return
        recent = self.progress.recent
        recent.append(accuracy)
        del recent[: -self.window]
        if self.section is not None and self._mean() >= self.section.threshold and not self.at_last_stage:
            self.progress.stage += 1
            recent.clear()

    @property
    def at_last_stage(self) -> bool:
        return self.progress.stage == len(self.stages) - 1

    def reached(self, accuracy: float | None) -> bool:
        """Whether the last stage is at `accuracy`, averaged over the window; never for None."""
        return accuracy is not None and self.at_last_stage and self._mean() >= accuracy

    def _mean(self) -> float:
        """Mean over the window, or 0 while it is not full."""
        recent = self.progress.recent
        return sum(recent) / len(recent) if len(recent) == self.window else 0.0
