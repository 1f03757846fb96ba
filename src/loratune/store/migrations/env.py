"""What alembic runs: the pending migrations, on the connection and in the transaction it was given.

`store/upgrade.py` begins the transaction and commits it.
"""

from alembic import context

from loratune.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
