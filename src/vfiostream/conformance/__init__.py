"""Whether a driver's interface of migration is what it should be: rules as data, and a check for each.

A check works on an :class:`~vfiostream.access.contract.Access`, since it has to do what no device of ours would do.
What it does to a device ends the work of whoever uses that.
"""
