"""From a composed grid to a plan: what can run, identities, baselines, order."""
