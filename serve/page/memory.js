// What the browser remembers for the page. Where its user has forbidden that even asking throws; then it lasts as long
// as the page is open.
const meanwhile = {};

// where: "localStorage", or "sessionStorage" for what ends with the tab
export function recall(name, where = "localStorage") {
  if (name in meanwhile) return meanwhile[name];
  try {
    return window[where].getItem(name);
  } catch {
    return null;
  }
}

export function remember(name, value, where = "localStorage") {
  meanwhile[name] = value;
  try {
    window[where].setItem(name, value);
  } catch {} // forbidden, or full
}
