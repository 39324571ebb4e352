"""From two shallow models to a deep one of equal layers: each part's peak grows by the same bytes a layer.

    peak(part, L layers) = peak(part, 4) + (L − 4) · (peak(part, 4) − peak(part, 3))
    peak(L) = the largest peak(part, L)

The parts are kept apart finely enough that within one of them the peak stays at the same place whatever the depth:
by step and phase, and in the blocks by whether it is the first, the second, the last but one or the last. (In the
blocks between, the bytes change evenly from one to the next, so the largest is at one of the ends.) Three and four
layers are the smallest depths that have all of these; the overall peak may move between them as depth grows, which
is why only the parts are extrapolated and the maximum is taken afterwards.

Where layers of several kinds alternate (a sliding window in every second one), what repeats is a group of them: then
"layers" are such groups, and the place of a block in its group is one more thing that keeps the parts apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qlora_kit.memory.track import Peak, Region

SHALLOW, DEEP = 3, 4  # groups that are simulated

Part = tuple[int, str, bool, int]  # step, phase, recomputes, place in the group
Key = tuple[Part, int | None]  # and the group (negative: from the end)


class NotEvenError(Exception):
    """The two shallow models differ by more than a layer: the deep one must be run whole."""


def extrapolate(
    shallow: Mapping[Region, Peak], deep: Mapping[Region, Peak], layers: int, period: int = 1
) -> list[Peak]:
    """The peaks of each region at `layers` layers, from those at 3 and at 4 groups, in the order of the step.

    A group has `period` layers, and `layers` is a multiple of it. Raises `NotEvenError` where they do not grow evenly.
    """
    at_shallow = {key: peak for peak in shallow.values() for key in _keys(peak.region, SHALLOW, period)}
    at_deep = {key: peak for peak in deep.values() for key in _keys(peak.region, DEEP, period)}
    if at_shallow.keys() != at_deep.keys():
        raise NotEvenError("the parts of the step differ")
    groups = layers // period
    grown = {key: _grow(at_shallow[key], at_deep[key], groups) for key in at_deep}
    return list(_in_order(deep, grown, groups, period))


def _keys(region: Region, groups: int, period: int) -> Iterator[Key]:
    """The parts that a region is in; with three groups the one in the middle is the second and the last but one."""
    part = _part(region, period)
    if region.block is None:
        yield part, None
        return
    group = region.block // period
    if group < 2:
        yield part, group
    if group >= groups - 2:
        yield part, group - groups


def _part(region: Region, period: int) -> Part:
    return region.step, region.phase, region.recomputes, (region.block or 0) % period


def _grow(shallow: Peak, deep: Peak, groups: int) -> Peak:
    if shallow.operation != deep.operation:
        raise NotEvenError(f"the peak of {deep.region} is at {shallow.operation} and at {deep.operation}")
    more = groups - DEEP
    names = deep.components.keys() | shallow.components.keys()
    components = {}
    for name in names:
        here, before = deep.components.get(name, 0), shallow.components.get(name, 0)
        components[name] = here + more * (here - before)
    if any(n_bytes < 0 for n_bytes in components.values()):
        raise NotEvenError(f"a component of {deep.region} shrinks with depth")
    total = deep.n_bytes + more * (deep.n_bytes - shallow.n_bytes)
    return Peak(
        n_bytes=total,
        region=deep.region,
        operation=deep.operation,
        components={name: n for name, n in components.items() if n},
    )


def _in_order(deep: Mapping[Region, Peak], grown: Mapping[Key, Peak], groups: int, period: int) -> Iterator[Peak]:
    """The peaks of all blocks, those in the middle filled in where the simulation has its two middle groups."""
    filled = set()
    for region in deep:
        part = _part(region, period)
        if region.block is None:
            yield grown[part, None]
            continue
        group, place = divmod(region.block, period)
        if group in (0, DEEP - 1):
            key, at = (0, 0) if group == 0 else (-1, groups - 1)
            yield _at(grown[part, key], at * period + place)
        elif (region.step, region.phase) not in filled:
            filled.add((region.step, region.phase))
            parts = [_part(r, period) for r in deep if _passes(r, region, period)]
            middle = range(1, groups - 1)
            for at in middle if group == 1 else reversed(middle):  # as the pass meets them
                yield from (_between(grown[p, 1], grown[p, -2], at, groups, period) for p in parts)


def _passes(one: Region, other: Region, period: int) -> bool:
    """Whether two regions are of the same phase of a step and the same group of blocks."""
    if one.block is None or other.block is None or (one.step, one.phase) != (other.step, other.phase):
        return False
    return one.block // period == other.block // period


def _at(peak: Peak, block: int) -> Peak:
    region = Region(step=peak.region.step, phase=peak.region.phase, block=block, recomputes=peak.region.recomputes)
    return Peak(n_bytes=peak.n_bytes, region=region, operation=peak.operation, components=peak.components)


def _between(first: Peak, last: Peak, group: int, groups: int, period: int) -> Peak:
    """The peak in a block of a middle group, on the line between the second group and the last but one."""
    steps = groups - 3
    components = {}
    for name in first.components.keys() | last.components.keys():
        start, end = first.components.get(name, 0), last.components.get(name, 0)
        components[name] = start + (end - start) * (group - 1) // steps
    components = {name: n for name, n in components.items() if n}
    block = group * period + (first.region.block or 0) % period
    return _at(
        Peak(n_bytes=sum(components.values()), region=first.region, operation=first.operation, components=components),
        block,
    )
