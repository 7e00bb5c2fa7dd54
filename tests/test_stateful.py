"""Agreement with the slow reference: whole decodings, and rounds in any order."""

import math
from contextlib import suppress
from dataclasses import replace

import reference
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from reference import NEVER, Unclear, units_of
from test_tie import SCORES, near, problems

import tie


def values(means: list[reference.Mean]) -> torch.Tensor:
    return torch.tensor([float(mean.value) for mean in means])


def tallied(runs: list[tie.Run], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and top-1 probabilities (M, B) of the round or in total."""
    tallies = [getattr(run, name) for run in runs]
    return torch.stack([x.score for x in tallies]), torch.stack([x.top1 for x in tallies])


@given(problems())
def test_ensemble_equals_the_slow_reference_in_everything(problem):
    try:
        rows = reference.ensemble(*problem)
    except Unclear:
        reject()
    result = tie.ensemble(*problem)
    M = len(problem.members)
    relays = max(len(row.leaders) for row in rows)
    assert (type(result.not_relayed), type(result.forwards)) == (int, float)
    assert result.not_relayed == sum(row.not_relayed for row in rows)
    forwards = [len(t.steps) + t.extra_forwards for row in rows for t in row.trajectories]
    assert result.forwards == sum(forwards) / len(rows)
    for b, row in enumerate(rows):
        ended = relays - len(row.leaders)
        scores = torch.tensor(row.scores + [[NEVER] * M] * ended).view(relays, M)
        counts = [[count or 0 for count, _ in t.steps] for t in row.trajectories]
        tcc = [float(sum(count)) if M > 1 else math.nan for count in counts]
        tops = [float(top.value) for top in row.score(whole=True)[1]]
        assert [units_of(c, b) for c in result.candidates] == [t.units for t in row.trajectories]
        assert result.leaders[:, b].tolist() == row.leaders + [-1] * ended
        assert near(result.scores[:, :, b], scores)
        assert near(result.tcc[:, b], torch.tensor(tcc))
        assert near(result.top1[:, b], torch.tensor(tops))
        assert result.winner[b] == row.winner


class Rounds(RuleBasedStateMachine):
    """`runs` are the members at work in tie, `rows` the same in the reference."""

    @initialize(problem=problems())
    def begin(self, problem):
        members, canvases, self.config = problem
        pairs = enumerate(zip(members, canvases))
        self.runs = [tie.Run(m, *pair, self.config, alone=False) for m, pair in pairs]
        self.rows = [
            reference.Row(*problem[:2], b, self.config) for b in range(len(canvases[0].tokens))
        ]
        self.not_relayed = 0

    @precondition(lambda self: all(run.canvas.complete.all() for run in self.runs))
    @rule(problem=problems())
    def begin_again(self, problem):
        self.begin(problem)

    @rule(n=st.integers(1, 4))
    def generate(self, n):
        try:
            steps = max(row.generate(n) for row in self.rows)
        except Unclear:
            reject()
        self.configure(interval=n)
        assert tie.generate(self.runs) == steps

    def configure(self, **changes):
        for run in self.runs:
            run.config = replace(self.config, **changes)

    @rule(
        n=st.integers(1, 4),
        score=st.sampled_from(SCORES),
        cross_model=st.booleans(),
        appointed=st.none() | st.tuples(st.integers(-1, 2), st.integers(-1, 2)),
    )
    def one_round(self, n, score, cross_model, appointed):
        """Relays the elected leaders' states, or those of others (-1: nobody's)."""
        self.generate(n)
        ended = torch.stack([run.canvas.complete for run in self.runs]).any(0)  # (B,)
        if ended.all():
            return
        scores, top1 = tallied(self.runs, "round")
        received = [[tie.receive(run, sender) for sender in self.runs] for run in self.runs]
        readings = []
        if score != "token_change_count":
            self.configure(score=score, cross_model=cross_model)
            scores, readings = tie.assess(self.runs, received, ended)
        leaders = tie.lead(scores, top1).masked_fill(ended, -1)
        for b in (~ended).nonzero().flatten().tolist():
            row = self.rows[b]
            expected, tops = row.score()
            if score != "token_change_count":
                expected = row.assess(score, cross_model)
                assert near(scores[:, b], values(expected))
            with suppress(Unclear):
                assert leaders[b] == reference.leader(expected, tops)
            if appointed is not None:
                leaders[b] = min(appointed[b], len(self.runs) - 1)
            row.relay(int(leaders[b]), expected)
        self.not_relayed += tie.relay(self.runs, received, readings, leaders)
        assert self.not_relayed == sum(row.not_relayed for row in self.rows)

    @invariant()
    def every_state_is_the_references(self):
        for b, row in enumerate(self.rows):
            for run, slow in zip(self.runs, row.trajectories):
                assert units_of(run.canvas, b) == slow.units
                assert run.forwards[b] == len(slow.steps) + slow.extra_forwards

    @invariant()
    def every_tally_is_the_references_and_so_would_be_the_final_response(self):
        for name in ("round", "total"):
            scores, top1 = tallied(self.runs, name)
            winners = tie.lead(scores, top1)
            for b, row in enumerate(self.rows):
                expected, tops = row.score(whole=name == "total")
                assert near(scores[:, b], values(expected)) and near(top1[:, b], values(tops))
                with suppress(Unclear):
                    assert winners[b] == reference.leader(expected, tops)


TestRounds = Rounds.TestCase
TestRounds.settings = settings(stateful_step_count=15)
