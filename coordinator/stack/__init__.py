"""The embedded stack: broker, coordinator and sites as real processes of one machine, kept in one folder."""
