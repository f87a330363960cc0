"""Alembic's entry: runs the migrations on the connection that `sidecar.store.migrate` hands over, in one transaction."""

from alembic import context

from sidecar.store.schema import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transactional_ddl=True,  # both databases can; the connection begins its transactions itself
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
