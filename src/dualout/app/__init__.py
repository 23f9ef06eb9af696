"""The web page: `studio` makes what it shows, `page` shows it."""
