"""The coordinator: jobs, rounds, the gate, strategies, the command line and the embedded stack."""
