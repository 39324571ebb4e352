"""From two shallow models to a deep one of equal layers: each part's peak grows by the same bytes a layer.

The parts are kept apart finely enough that within one of them the peak stays at the same place whatever the depth:
by step and phase, and in the blocks by whether it is the first, the second, the last but one or the last. (In the
blocks between, the bytes change evenly from one to the next, so the largest is at one of the ends.) Three and four
layers are the smallest depths that have all of these; the overall peak may move between them as depth grows, which
is why only the parts are extrapolated and the maximum is taken afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qlora_kit.memory.track import Peak, Region

SHALLOW, DEEP = 3, 4  # layers that are simulated

Key = tuple[int, str, bool, int | None]  # step, phase, recomputes, block (negative: from the end)


class NotEvenError(Exception):
    """The two shallow models differ by more than a layer: the deep one must be run whole."""


def extrapolate(shallow: Mapping[Region, Peak], deep: Mapping[Region, Peak], layers: int) -> list[Peak]:
    """The peaks of each region at `layers` layers, from those at 3 and at 4, in the order of the step.

    Raises `NotEvenError` where they do not grow evenly.
    """
    at_shallow = {key: peak for peak in shallow.values() for key in _keys(peak.region, SHALLOW)}
    at_deep = {key: peak for peak in deep.values() for key in _keys(peak.region, DEEP)}
    if at_shallow.keys() != at_deep.keys():
        raise NotEvenError("the parts of the step differ")
    grown = {key: _grow(at_shallow[key], at_deep[key], layers) for key in at_deep}
    return list(_in_order(deep, grown, layers))


def _keys(region: Region, layers: int) -> Iterator[Key]:
    """The parts that a region is in; with three layers the one in the middle is the second and the last but one."""
    if region.block is None:
        yield region.step, region.phase, region.recomputes, None
        return
    if region.block < 2:
        yield region.step, region.phase, region.recomputes, region.block
    if region.block >= layers - 2:
        yield region.step, region.phase, region.recomputes, region.block - layers


def _grow(shallow: Peak, deep: Peak, layers: int) -> Peak:
    if shallow.operation != deep.operation:
        raise NotEvenError(f"the peak of {deep.region} is at {shallow.operation} and at {deep.operation}")
    more = layers - DEEP
    names = deep.components.keys() | shallow.components.keys()
    components = {}
    for name in names:
        here, before = deep.components.get(name, 0), shallow.components.get(name, 0)
        components[name] = here + more * (here - before)
    if any(n_bytes < 0 for n_bytes in components.values()):
        raise NotEvenError(f"a component of {deep.region} shrinks with depth")
    total = deep.n_bytes + more * (deep.n_bytes - shallow.n_bytes)
    return Peak(total, deep.region, deep.operation, {name: n for name, n in components.items() if n})


def _in_order(deep: Mapping[Region, Peak], grown: Mapping[Key, Peak], layers: int) -> Iterator[Peak]:
    """The peaks of all blocks, those in the middle filled in where the simulation has its two middle ones."""
    filled = set()
    for region in deep:
        if region.block is None:
            yield grown[(*_part(region), None)]
        elif region.block in (0, DEEP - 1):
            block = 0 if region.block == 0 else layers - 1
            yield _at(grown[next(_keys(region, DEEP))], block)
        elif (region.step, region.phase) not in filled:
            filled.add((region.step, region.phase))
            yield from _middle(region, deep, grown, layers)


def _middle(region: Region, deep: Mapping[Region, Peak], grown: Mapping[Key, Peak], layers: int) -> Iterator[Peak]:
    """All blocks but the first and the last, in the direction in which the pass meets them, each with its parts."""
    parts = [_part(r) for r in deep if (r.step, r.phase, r.block) == (region.step, region.phase, region.block)]
    blocks = range(1, layers - 1)
    for block in blocks if region.block == 1 else reversed(blocks):
        for part in parts:
            yield _between(grown[(*part, 1)], grown[(*part, -2)], block, layers)


def _part(region: Region) -> tuple[int, str, bool]:
    return region.step, region.phase, region.recomputes


def _at(peak: Peak, block: int) -> Peak:
    region = Region(peak.region.step, peak.region.phase, block, peak.region.recomputes)
    return Peak(peak.n_bytes, region, peak.operation, peak.components)


def _between(first: Peak, last: Peak, block: int, layers: int) -> Peak:
    """The peak in a middle block, on the line between the second block and the last but one."""
    steps = layers - 3
    components = {}
    for name in first.components.keys() | last.components.keys():
        start, end = first.components.get(name, 0), last.components.get(name, 0)
        components[name] = start + (end - start) * (block - 1) // steps
    components = {name: n for name, n in components.items() if n}
    return _at(Peak(sum(components.values()), first.region, first.operation, components), block)
