"""The suite of associative recall (MQAR): accuracy over the number of pairs, of every arm and in every regime.

| regime | a row is read |
|---|---|
| F | in one call, all of it in attention |
| W | in one call, by a model whose attention reaches only a window |
| D | pairs written to memory, keys and values dropped, then the queries on the state alone |

Right is a query whose value is the most likely token behind its key, with the values of the queries before it in the
text. Controls as in the other suites; `no_needle` writes other pairs in place of all that are asked for. Who guesses
among all values is right once in as many; who knows the values of the row and not their keys once in `n_pairs`. The
queries of a row are not independent, so the intervals are Wilson's for as many items as there are rows, and the
gain's bootstrap draws whole rows.
"""

from __future__ import annotations

from memlayers.eval.config import EvalConfig, MqarSuiteConfig
from memlayers.eval.plan import Job, Plan
from memlayers.eval.regimes import Asker
from memlayers.eval.statistics import paired_bootstrap, wilson
from memlayers.eval.suites import INDICES_PER_LENGTH, Items, check_kept
from memlayers.eval.tokens import TokenAsker, TokenPredictions
from memlayers.tasks import MqarTask, Sample, rng_for

Key = tuple[str, int, int, str]  # regime, length, number of pairs, arm or control


class MqarSuite:
    """Asks the models one after the other, and scores what they said.

    model: the trained one. window: tokens the cut arms see. missing: stages without a model -> reason.
    Raises `ConfigError` for token ids that the model has no embedding for, `ValueError` for a vocabulary that is too
    small.
    """

    def __init__(
        self,
        name: str,
        suite: MqarSuiteConfig,
        config: EvalConfig,
        tokenizer,
        model,
        window: int,
        missing: dict[str, str],
    ) -> None:
        self.name, self.suite, self.config = name, suite, config
        self.task = MqarTask(suite.task, tokenizer, split="eval")
        self.task.check_embeddings(model.get_input_embeddings().weight.shape[0], f"suites.{name}.task")
        self.items: dict[tuple[int, int], Items] = {}  # length, number of pairs
        self.jobs: list[tuple[int, Job]] = []  # number of pairs, job
        self.said: dict[Key, TokenPredictions] = {}
        self.not_run: dict[Key, str] = {}
        for n_pairs in sorted(suite.n_pairs):
            fields = {"n_pairs": n_pairs, "tokens_per_pair": None}
            task = MqarTask(suite.task.model_copy(update=fields), tokenizer, split="eval")
            per_length = [
                _items(task, n_pairs, length, suite.n, config.seed)
                for length in sorted(suite.lengths or [self.task.length_for(n_pairs)])
            ]
            plan = Plan(config, {name: per_length}, model, window, missing)
            self.items |= {(items.length, n_pairs): items for items in per_length}
            self.jobs += [(n_pairs, job) for job in plan.jobs]
            self.not_run |= {(s.regime, s.length, n_pairs, s.name): s.reason for s in plan.skipped}

    def wanted(self, stage: str) -> list[str]:
        """Arms and controls to ask of the model of `stage`."""
        return [name for _, job in self.jobs if job.stage == stage for name in job.names]

    @property
    def n_answers(self) -> int:
        return sum(len(job.names) * _n_answers(job.items.samples) for _, job in self.jobs)

    def ask(self, stage: str, asker: Asker) -> None:
        """Ask what the model of `stage` can answer."""
        tokens = TokenAsker(asker)
        for n_pairs, job in self.jobs:
            if job.stage != stage:
                continue
            cells = [
                [(regime, job.items.length, n_pairs, name) for regime in job.regimes] for name in job.names
            ]
            try:
                answers = job.ask(tokens)
            except ValueError as error:
                if "positions" not in str(error):
                    raise
                self.not_run |= {key: str(error) for keys in cells for key in keys}
                continue
            self.said |= {key: said for keys, said in zip(cells, answers) for key in keys}

    def rows(self) -> list[dict]:
        """One line a row and arm, for samples.jsonl."""
        return [
            {
                "suite": self.name,
                "regime": regime,
                "length": length,
                "n_pairs": n_pairs,
                "arm": arm,
                "haystack": number,
                "keys": [sample.questions[0].ids[at - 1] for at in sample.questions[0].answer_at],
                "answers": _answers(sample),
                "predictions": predictions,
                "correct": sum(right) / len(right),
            }
            for (regime, length, n_pairs, arm), said in self.said.items()
            for number, (sample, predictions, right) in enumerate(
                zip(self.items[length, n_pairs].samples, said, self._right((regime, length, n_pairs, arm)))
            )
        ]

    def report(self) -> dict:
        """{chance, results, controls, gain} of this suite.

        results[regime][length][n_pairs][arm] and controls the same: {n, rows, accuracy, ci_low, ci_high} or
        {not_run: reason}, n being queries. gain[regime][length][n_pairs]: trained − base_cut, with a bootstrap
        interval over rows.
        """
        report: dict = {"chance": self.task.chance, "results": {}, "controls": {}, "gain": {}}
        for regime in self.suite.regimes:
            for length, n_pairs in sorted(self.items):
                for part, names in (("results", self.config.arms), ("controls", self.config.controls)):
                    cells = {name: self._cell((regime, length, n_pairs, name)) for name in names}
                    _put(report[part], regime, length, n_pairs, cells)
                if gain := self._gain(regime, length, n_pairs):
                    _put(report["gain"], regime, length, n_pairs, gain)
        return report

    def _right(self, key: Key) -> list[list[bool]]:
        """For each row, which of its queries were answered with their value."""
        _, length, n_pairs, _ = key
        samples = self.items[length, n_pairs].samples
        return [
            [token == answer for token, answer in zip(said, _answers(sample), strict=True)]
            for sample, said in zip(samples, self.said[key], strict=True)
        ]

    def _cell(self, key: Key) -> dict:
        if key not in self.said:
            return {"not_run": self.not_run[key]}
        right = self._right(key)
        n, rows = sum(map(len, right)), len(right)
        accuracy = sum(map(sum, right)) / n
        low, high = wilson(round(accuracy * rows), rows)
        return {"n": n, "rows": rows, "accuracy": accuracy, "ci_low": low, "ci_high": high}

    def _gain(self, regime: str, length: int, n_pairs: int) -> dict | None:
        keys = [(regime, length, n_pairs, arm) for arm in ("trained", "base_cut")]
        if not all(key in self.said for key in keys):
            return None
        trained, cut = (self._right(key) for key in keys)
        differences = [(sum(a) - sum(b)) / len(a) for a, b in zip(trained, cut)]
        bounds = paired_bootstrap(
            differences, range(len(differences)), resamples=self.config.resamples, seed=self.config.seed
        )
        low, high = bounds or (None, None)
        return {
            "rows": len(differences),
            "gain": sum(differences) / len(differences),
            "ci_low": low,
            "ci_high": high,
        }


def _items(task: MqarTask, n_pairs: int, length: int, n: int, seed: int) -> Items:
    """`n` rows and the same without what is asked for; none, with the reason, where they do not fit."""
    check_kept(n, length)
    first = (length * INDICES_PER_LENGTH + n_pairs) * INDICES_PER_LENGTH
    samples, empty = [], []
    for index in range(first, first + n):
        try:
            samples.append(task.sample(rng_for("eval", seed, index), length))
            empty.append(task.sample(rng_for("eval", seed, index), length, needle=False))
        except ValueError as error:
            return Items(length, [], [], [], not_run=str(error))
    return Items(length, samples, empty, [])


def _answers(sample: Sample) -> list[int]:
    question = sample.questions[0]
    return [question.ids[at] for at in question.answer_at]


def _n_answers(samples: list[Sample]) -> int:
    return sum(len(sample.questions[0].answer_at) for sample in samples)


def _put(tree: dict, regime: str, length: int, n_pairs: int, value: dict) -> None:
    tree.setdefault(regime, {}).setdefault(str(length), {})[str(n_pairs)] = value
