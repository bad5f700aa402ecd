"""Pipeline parallel: schedules as data, their checker, their simulator and their drawings.

A schedule is made by a pure function of (ranks, microbatches, virtual stages): a tuple of ``camshaft.program.Action``
for each rank (``schedules.make``). ``transfers.complete`` puts sends and receives between the computations,
``checker.check_schedule`` refuses what is incomplete or can wait forever, ``simulator.simulate`` says what it costs.
"""
