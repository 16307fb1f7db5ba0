"""The trust gate: faults planted in the engine, each of which the tests must see.

catalogue.py   the mutants: a small change of the source each, and the tests that must fail with it
gate.py        plants one in a copy of the tree, runs its tests, says what came of it
__main__.py    ``just mutants``
"""
