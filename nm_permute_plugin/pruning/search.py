# SPDX-License-Identifier: Apache-2.0
"""A good permutation without learning: channel allocation, then exact assignment."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from nm_permute_plugin.maths.allocation import allocate, joining_gain
from nm_permute_plugin.maths.assignment import assign
from nm_permute_plugin.maths.masks import retained_score
from nm_permute_plugin.maths.pattern import NMPattern
from nm_permute_plugin.maths.permutation import Permutation, from_blocks
from nm_permute_plugin.maths.ranks import descending
from nm_permute_plugin.pruning import ranks
from nm_permute_plugin.pruning.problem import Problem, Solution, SpaceScores
from nm_permute_plugin.pruning.session import once
from nm_permute_plugin.pruning.settings import Settings

Segments = Float[Tensor, "segments rows size"]
"""The scores of one or several spaces, cut at the borders that no channel may cross."""

Perms = dict[str, Permutation]
"""One permutation a space, by the space's name."""

History = list[dict[str, int | float]]
"""One entry a validation: its round or step, and the losses."""

ROUNDS_BETWEEN_VALIDATIONS = 3
"""Rounds from one validation to the next: retained score says little of a model."""

MOST_SCORES = 1 << 28
"""Scores searched at a time: more of them do not make a GPU any faster."""

MOST_GROUPS = 1024
"""Groups that an assignment deals with at a time: its time grows with their cube, and of
2,240 groups the search loses a fifteenth of its gain by three parts instead of one."""

MOST_SCORES_OF_A_SPACE = 1 << 28
"""Larger spaces are searched on an even subset of their rows, which represents the rest."""


READ = {"score", "mask_structure", "seed", "search", "loss", "objective", "spec"}
"""The settings that a search depends on, beside the model and the data."""


def search_problem(
    problem: Problem,
    settings: Settings,
    spaces: Mapping[str, SpaceScores] | None = None,
) -> tuple[Solution, History]:
    """
    Search a problem's permutations, judged by its validation loss: see ``search``.

    :param spaces: of the problem, with scores, where it has none
    """
    perms, history = once(
        lambda: search(
            problem.spaces if spaces is None else spaces,
            problem.pattern,
            settings.search.rounds,
            settings.seed,
            lambda perms: problem.validate(Solution(perms)),
            problem.device,
        ),
        "search",
        *(problem.known, sorted(problem.spaces), settings.model_dump(include=READ)),
    )
    return Solution(perms), history


def search(
    spaces: Mapping[str, SpaceScores],
    pattern: NMPattern,
    rounds: int,
    seed: int,
    validate: Callable[[Perms], float],
    device: torch.device | None = None,
) -> tuple[Perms, History]:
    """
    Search a permutation of every space that retains more score, and validate the whole.

    Channel allocation and assignment after RIA (Zhang et al., ICLR 2024, section 4),
    for all consumers of a space at once: their scores stand one below the other. Each
    round takes one channel out of every group and puts all of them back by the best
    assignment, so that the retained score (of the rows searched, by their sensitivity)
    never falls.

    A model that retains more score may still be a worse one: the permutations with the
    least validation loss are kept, the channels as they are among them. At every validation
    all permutations may take the place of the best, or those of one family of spaces alone.
    Of several ranks the first one searches, and all of them validate.

    :param rounds: of assignment, rounded up to the next validation
    :param seed: of the choice which channels leave their groups
    :param validate: the loss of the model under permutations, smaller is better
    :param device: of the search, the scores of one round at a time; theirs if it is None
    :raises ValueError: if M does not divide a segment of a space
    """
    best = {
        name: torch.arange(of.space.size, device=device or of.score.device)
        for name, of in spaces.items()
    }
    step = ROUNDS_BETWEEN_VALIDATIONS
    numbers = range(step, rounds + step, step)
    together = [list(spaces), *_families(spaces)]
    # Counted are rounds and validations; the start is a round as well.
    counted = 2 + len(numbers) * (step + len(together))
    what, is_shown = "Searching the permutation", bool(numbers)
    with ranks.bar(desc=what, total=counted, shown=is_shown) as bar:
        least = validate(best)
        bar.update()
        history: History = [{"round": 0, "validation": least}]
        if not rounds:
            return best, history
        found = rounds_of_all(spaces, pattern, seed, device)
        if ranks.is_first():
            next(found)  # the channels as they are or dealt, whichever retains more
        bar.update()

        def searched() -> Perms:
            for _ in range(step):
                perms = next(found)
                bar.update()
            return perms

        for number in numbers:
            perms = ranks.of_first(searched)
            for names in together:
                tried = best | {name: perms[name] for name in names}
                loss = validate(tried)
                bar.update()
                if loss < least:
                    least, best = loss, tried
            history.append({"round": number, "validation": least})
    return best, history


def _families(spaces: Mapping[str, SpaceScores]) -> list[list[str]]:
    """The spaces of each family, where there is more than one family."""
    families: dict[str, list[str]] = defaultdict(list)
    for name, of in spaces.items():
        families[of.space.family].append(name)
    return list(families.values()) if len(families) > 1 else []


def rounds_of_all(
    spaces: Mapping[str, SpaceScores],
    pattern: NMPattern,
    seed: int,
    device: torch.device | None,
) -> Iterator[Perms]:
    """
    The permutations of all spaces, a round at a time; segments of one shape go
    together.
    """
    segments = {name: segments_of(of, pattern) for name, of in spaces.items()}
    batches = []
    for names in alike({name: of.shape[1:] for name, of in segments.items()}):
        counts = [len(segments[name]) for name in names]
        # A generator a segment: what is found does not depend on the company.
        generators = [
            torch.Generator().manual_seed(seed + number)
            for count in counts
            for number in range(count)
        ]
        # Concatenate one batch at a time and keep no reference to it: only one copy exists.
        rounds = _rounds(
            torch.cat([_weighted(segments[name], spaces[name]) for name in names]),
            *(pattern, generators, device),
        )
        batches.append((names, counts, rounds))
    del segments
    while True:
        found: Perms = {}
        for names, counts, rounds in batches:
            parts = next(rounds).split(counts)
            found |= dict(zip(names, map(from_blocks, parts), strict=True))
        yield {name: found[name] for name in spaces}


def segments_of(of: SpaceScores, pattern: NMPattern) -> Segments:
    """
    The scores of a space, of a subset of the rows where they are many, cut at borders.
    """
    size = of.space.segment
    if size % pattern.m:
        raise ValueError(
            f"M={pattern.m} does not divide the {size} channels of a segment of space "
            f"{of.space.name}"
        )
    rows = of.score[:: _stride(of)]
    return rearrange(rows, "rows (segment size) -> segment rows size", size=size)


def _stride(of: SpaceScores) -> int:
    """
    1 takes all rows of a space's scores; a larger number takes one row out of as many.
    """
    return -(-of.score.numel() // MOST_SCORES_OF_A_SPACE)


def _weighted(segments: Segments, of: SpaceScores) -> Segments:
    """The segments of a space, each row times its sensitivity."""
    if of.sensitivity is None:
        return segments
    return segments * of.sensitivity[:: _stride(of), None].to(segments.device)


def alike(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Names whose shapes are the same, as many at a time as fit into ``MOST_SCORES``."""
    by_shape: dict[torch.Size, list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        by_shape[shape].append(name)
    for shape, names in by_shape.items():
        most = max(1, MOST_SCORES // shape.numel())
        yield from (names[i : i + most] for i in range(0, len(names), most))


def _rounds(
    segments: Segments,
    pattern: NMPattern,
    generators: Sequence[torch.Generator],
    device: torch.device | None = None,
) -> Iterator[Int[Tensor, "segments size"]]:
    """The start of the search in every segment, then the permutation after each round."""
    device = device or segments.device
    groups = _start(segments.to(device), pattern)
    table = rearrange(segments, "segment rows size -> segment size rows").contiguous()
    del segments  # as large as the table
    while True:
        in_order = groups.sort(dim=-1).values
        yield rearrange(in_order, "segment group m -> segment (group m)")
        keys = torch.stack(
            [torch.rand(groups.shape[1:], generator=own) for own in generators]
        )
        shuffled = groups.gather(-1, keys.to(device).argsort(dim=-1))
        groups = _reassigned(table.to(device), shuffled, pattern, generators)


def _reassigned(
    table: Float[Tensor, "segments size rows"],
    groups: Int[Tensor, "segments groups m"],
    pattern: NMPattern,
    generators: Sequence[torch.Generator],
) -> Int[Tensor, "segments groups m"]:
    """``_reassign``, where there are many groups in random parts of them."""
    count = groups.shape[1]
    if count <= MOST_GROUPS:
        return _reassign(table, groups, pattern)
    orders = [torch.randperm(count, generator=own) for own in generators]
    order = torch.stack(orders).to(groups.device)[..., None].expand_as(groups)
    parts = groups.gather(1, order).chunk(-(-count // MOST_GROUPS), dim=1)
    return torch.cat([_reassign(table, part, pattern) for part in parts], dim=1)


def _reassign(
    table: Float[Tensor, "segments size rows"],
    groups: Int[Tensor, "segments groups m"],
    pattern: NMPattern,
) -> Int[Tensor, "segments groups m"]:
    """Take the first channel out of every group, and reassign all for the largest gain."""
    segment = torch.arange(len(table), device=table.device)[:, None, None]
    leaving, staying = groups[..., :1], groups[..., 1:]
    companions = rearrange(
        table[segment, staying], "segment g other rows -> segment g rows other"
    )
    threshold = descending(companions)[pattern.n - 1]
    scores = rearrange(
        table[segment, leaving], "segment g one rows -> segment (g one) rows"
    )
    target = assign(joining_gain(scores, threshold))
    back = leaving.gather(1, torch.argsort(target, dim=-1)[..., None])
    return torch.cat([back, staying], dim=-1)


def _start(segments: Segments, pattern: NMPattern) -> Int[Tensor, "segments groups m"]:
    """In every segment the channels as they are or allocated, whichever retains more."""
    dealt = allocate(segments, pattern.m)
    as_they_are = torch.arange(segments.shape[-1], device=segments.device)
    perms = torch.stack([as_they_are.expand_as(dealt), dealt])
    retained = torch.stack([_retained(segments, perm, pattern) for perm in perms])
    best = retained.argmax(0)[None, :, None].expand_as(perms[:1])
    better = perms.gather(0, best)[0]
    return rearrange(better, "segment (group m) -> segment group m", m=pattern.m)


def _retained(
    segments: Segments, perms: Int[Tensor, "segments size"], pattern: NMPattern
) -> Float[Tensor, " segments"]:
    """The score that the N:M mask retains in each segment."""
    retained = [
        retained_score(segment[:, perm], pattern)
        for segment, perm in zip(segments, perms, strict=True)
    ]
    return torch.tensor(retained, device=segments.device, dtype=torch.float64)
