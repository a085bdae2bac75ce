"""Storage of build results: schema, migrations, writer, blob store. The default location of the data is `./catalog`.

May not import other stages; the loader reads the same schema with the standard library alone
(`llmbuild.runtime.reader`).
"""
