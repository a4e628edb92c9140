// Keeps conversations in IndexedDB; the list apart, so that it opens without the pictures.

const opened = new Promise((resolve, reject) => {
  const request = indexedDB.open("qwen35-mlx", 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("list", { keyPath: "id" });
    request.result.createObjectStore("conversations", { keyPath: "id" });
  };
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
// Whoever uses it is told.
opened.catch(() => {});

async function act(mode, action) {
  const transaction = (await opened).transaction(["list", "conversations"], mode);
  const [list, conversations] = ["list", "conversations"].map((n) => transaction.objectStore(n));
  return new Promise((resolve, reject) => {
    const request = action(list, conversations);
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

// [{id, title, updated}], the latest first.
export const list = async () =>
  (await act("readonly", (list) => list.getAll())).sort((a, b) => b.updated - a.updated);

export const load = (id) => act("readonly", (_, conversations) => conversations.get(id));

export const save = (conversation) =>
  act("readwrite", (list, conversations) => {
    const { id, title, updated } = conversation;
    list.put({ id, title, updated });
    return conversations.put(conversation);
  });

export const remove = (id) =>
  act("readwrite", (list, conversations) => {
    list.delete(id);
    return conversations.delete(id);
  });
