"""Read the disassembly of a kernel."""

from __future__ import annotations

import re


def count_spills_in_loops(disassembly: str) -> int:
    """Loads and stores of local memory that execution can come back to.

    Rare branches stand behind the end of the code and jump back into it, so a label and a later
    jump to it need not be a loop.

    Args:
        disassembly: Of one kernel, as `nvdisasm -c` prints it.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in disassembly.splitlines():
        if label := re.match(r"\s*([.$]\S+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    successors = _successors(instructions, labels)
    spills = [i for i, text in enumerate(instructions) if re.search(r"\b(LDL|STL)\b", text)]
    return sum(_comes_back(i, successors) for i in spills)


def _successors(instructions: list[str], labels: dict[str, int]) -> list[list[int]]:
    """For each instruction, which can be executed next. Calls return; returns lead nowhere."""
    successors: list[list[int]] = []
    # By barrier, the place where diverged warps meet: execution continues there after BSYNC.
    meetings: dict[str, int] = {}
    for i, text in enumerate(instructions):
        after: list[int] = []
        if not re.match(r"BRA\s+`|EXIT\b|RET\b", text):
            after.append(i + 1)
        target = re.search(r"`\(([.$]\S+?)\)", text)
        if target and target[1] in labels:
            after.append(labels[target[1]])
            if barrier := re.search(r"BSSY\S* (B\d+)", text):
                meetings[barrier[1]] = labels[target[1]]
        elif (barrier := re.search(r"BSYNC\S* (B\d+)", text)) and barrier[1] in meetings:
            after.append(meetings[barrier[1]])
        successors.append([j for j in after if j < len(instructions)])
    return successors


def _comes_back(start: int, successors: list[list[int]]) -> bool:
    """Whether a path leads from an instruction to itself."""
    seen: set[int] = set()
    ahead = [*successors[start]]
    while ahead:
        i = ahead.pop()
        if i == start:
            return True
        if i not in seen:
            seen.add(i)
            ahead.extend(successors[i])
    return False
