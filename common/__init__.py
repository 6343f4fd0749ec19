"""The shared vocabulary: settings, errors, messages, queue names, logs, signing. Imports nothing of ours."""
