"""Tests on one cluster, which is gone once they have ended: a package, so that a fixture may last as long."""
