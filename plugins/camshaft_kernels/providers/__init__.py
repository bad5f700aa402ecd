"""What each provider offers, a module for each: imported only when something of it was chosen."""
