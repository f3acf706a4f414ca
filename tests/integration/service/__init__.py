"""Tests on one service, which is gone once they have ended: a package, so that a fixture may last as long."""
