"""Judge a policy: protocol, report, comparison, pages and films."""
