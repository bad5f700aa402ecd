"""Starting ranks and owning them: launchers, the front that watches, and what each rank does about its end."""
