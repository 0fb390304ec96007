"""Starting a stage in processes of its own, on this machine or as a cluster's job."""
