"""Where tasks are started and bytes are held: the source and the target of a migration.

The only package that knows devices, protocol and transports at once.
"""
