"""Reports on runs: a self-contained page, a comparison as a table, and a page that follows a run.

``runs`` and ``metrics_log`` read run directories, complete or not, whose files anyone may have
written; ``comparison`` finds what differs; ``page`` and its sections render the HTML, in which all
text from a run is escaped by ``html``; ``assets/`` has the page's style and the scripts that draw
its charts. To add a section, add a module with a function ``Report -> Html`` and list it in
``page``; to add a chart, add it to ``charts``. No tensor library is imported.
"""
