"""What a model needs on some devices, computed before anything is allocated.

In the order to read them: `job` is what shall be computed and how it is spread over devices.
`hardware` is what a device can do. `kinds` and `adaptive` count the attention of each kind, and
`caches` and `choosing` the bytes that it keeps. `attention`, `operations`, `memory` and `traffic`
count, for the rank that has most to do, pairs of queries and keys, FLOPs and bytes of each
operation, memory, and bytes sent. `plan` makes times of them and names what binds, and `changes`
finds the cheapest change that makes a job fit. `table` and `page` show a plan.
`calibration` measures this machine.
"""
