// The strip of pictures that were drawn: a click brings a picture's parameters back.

const MOST = 80;

export class History {
  constructor(list, restore) {
    this.list = list;
    this.restore = restore;
  }

  // Whether it is kept here, and with it the URL: the same picture again is not.
  add(url, parameters, label) {
    const last = this.list.firstElementChild;
    if (last && last.dataset.key === this.keyOf(parameters)) return false;
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = document.createElement("img");
    item.dataset.key = this.keyOf(parameters);
    item.dataset.url = url;
    image.src = url;
    image.alt = "";
    button.type = "button";
    button.title = label;
    button.setAttribute("aria-label", `Bring back: ${label}`);
    button.append(image);
    button.onclick = () => this.restore(parameters);
    item.append(button);
    this.list.prepend(item);
    while (this.list.children.length > MOST) {
      URL.revokeObjectURL(this.list.lastElementChild.dataset.url);
      this.list.lastElementChild.remove();
    }
    return true;
  }

  keyOf(parameters) {
    return JSON.stringify(parameters);
  }
}
