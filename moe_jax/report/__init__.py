"""Pages and figures about the runs in workdirs."""
