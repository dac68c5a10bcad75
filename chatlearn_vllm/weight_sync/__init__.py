"""Moving weights from training ranks into live engine parameters.

    planner.py    which rectangle of which training rank goes where; complete or refused
    transport.py  how one process's tensors are read by another, and the copies themselves

The driver's part, which calls both sides in order, is `runtime/weight_synchronizer.py`.
"""
