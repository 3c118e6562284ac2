"""Benchmarks: ``python -m askew_kernels bench`` (benchmarks/README.md explains the method and reads the results).

    peers     how each library that rows are compared with is used
    rows      one measurement, where it was taken, files, comparison with an earlier run
    goals     what a goal and a line of the README's table are, and how they are read from rows
    harness   checks, clocks, ceilings, turns: a Case becomes rows
    suites    the registry: cases, and beside them their goals and their lines of the README's table
    runs      which cases, in which process
    report    tables, plots, pages
    cli       arguments, progress, exit codes;  tune   the launch parameters of a device

Left never imports right (here: above never imports below), and nothing else of the package imports any of it.
"""
