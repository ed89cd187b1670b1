"""What whoever keeps conversations here wants to know of a snapshot later."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("snapshots", sa.Column("about", sa.Text))


def downgrade() -> None:
    op.drop_column("snapshots", "about")
